"""Routes written to a file while a run goes on, by a thread of their own: nothing waits for the disk."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from moe_trace.data.errors import OutputError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.file import IncompleteRoutes, RoutesWriter, read_routes
from moe_trace.record.calls.refusals import CallNumbers
from moe_trace.record.forward.isolation import warn_user


class RoutesStream:
    """Appends parts to a file in their order.

    Args:
        max_bytes: of parts that wait to be written; what comes then is dropped.

    Raises:
        OutputError: the file cannot be made.
    """

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        self.path = Path(path).absolute()  # the program may go elsewhere
        self.dropped: Counter[str] = Counter()
        """Rows, by reason."""
        self.written = CallNumbers()
        """Calls, by name, that stand in the file as decisions."""
        self._told: set[Hashable] = set()
        self._max_bytes, self._waiting_bytes = max_bytes, 0
        self._writer: RoutesWriter | None = RoutesWriter(self.path)
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._failed = False

    def append(self, rows: int, nbytes: int, part: Callable[[], RecordedRoutes]) -> bool:
        """Have a part made and written later; returns whether it will be."""
        if self._waiting_bytes + nbytes > self._max_bytes and self._waiting_bytes:
            self.dropped["disk too slow"] += rows
            return False
        self._waiting_bytes += nbytes
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moe_trace routes")
        self._last = self._thread.submit(self._write, rows, nbytes, part)
        return True

    def _write(self, rows: int, nbytes: int, part: Callable[[], RecordedRoutes]) -> None:
        try:
            if self._writer is None:  # recording went on after the file was closed
                before = read_routes(self.path)
                self._writer = RoutesWriter(self.path)
                self._writer.append(before)
            self._writer.append(part())
        except (OutputError, ValueError, MemoryError) as error:
            self.dropped["not written"] += rows
            if not self._failed:
                warn_user(f"routes are lost from here on: {error}")
            self._failed = True
        finally:
            self._waiting_bytes -= nbytes

    def tell_taken_back(self, calls: CallNumbers) -> None:
        """Say once of each router that some of its rows in the file are unknown by now."""
        for name, count in calls.shared(self.written).items():
            if name not in self._told:
                self._told.add(name)
                warn_user(
                    f"{name}: its experts turned out to be called as a module, and what its earlier calls "
                    f"assigned is unknown. {count} of those were written to {self.path} before: they stay"
                )

    def wait(self) -> None:
        """Until all that was appended is in the file."""
        if self._last is not None:
            self._last.result()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def read(self) -> RecordedRoutes | None:
        """All that stands in the file; None where nothing was written yet."""
        self.wait()
        if not self.path.stat().st_size:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteRoutes)
            return read_routes(self.path)
