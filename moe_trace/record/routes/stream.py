"""Writing of routes to a file during a run, on a separate thread, so that the model does not wait for it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from moe_trace.data.errors import OutputError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.reader import IncompleteRoutes, RoutesWriter, read_routes
from moe_trace.record.calls.refusals import CallNumbers
from moe_trace.record.forward.isolation import warn_user


class RoutesStream:
    """Writer that appends parts to a file in order.

    Args:
        max_bytes: limit for parts that wait to be written; further parts are dropped.

    Raises:
        OutputError: the file cannot be created.
    """

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        self.path = Path(path).absolute()  # the working directory may change
        self.dropped: Counter[str] = Counter()
        """Number of dropped rows, by reason."""
        self.written = CallNumbers()
        """Calls by router name whose assignments are in the file."""
        self._warned: set[Hashable] = set()
        self._max_bytes, self._waiting_bytes = max_bytes, 0
        self._writer: RoutesWriter | None = RoutesWriter(self.path)
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._failed = False

    def append(self, rows: int, nbytes: int, part: Callable[[], RecordedRoutes]) -> bool:
        """Queue a part to be made and written later; return False if it is dropped."""
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
        """Warn once per router that some of its rows in the file have become unknown."""
        for name, count in calls.shared(self.written).items():
            if name not in self._warned:
                self._warned.add(name)
                warn_user(
                    f"{name}: its experts turned out to be called as a module, and what its earlier calls "
                    f"assigned is unknown. {count} of those were written to {self.path} before: they stay"
                )

    def wait(self) -> None:
        """Wait until all queued parts are in the file."""
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
        """Return all routes in the file, or None if nothing was written yet."""
        self.wait()
        if not self.path.stat().st_size:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteRoutes)
            return read_routes(self.path)
