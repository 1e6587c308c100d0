"""Cache of trace summaries, kept while their files stay the same, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe_trace.data.errors import MoETraceError, TraceFileError
from moe_trace.read.analysis import TraceSummary, analyse
from moe_trace.read.file.trace_file import TraceFile, read_trace
from moe_trace.read.reduced.inputs import quickest
from moe_trace.show.tensorboard.catalog import OUTSIDE, Catalog, Trace, is_below

SUMMARIES_MAX_BYTES = 512 * 2**20
DERIVED_MAX = 32
"""Maximum number of results kept per summary: under the 2 MB of a view, or arrays smaller than it."""
REASONS_MAX = 4096

_NO_EVENTS = (
    "the trace is gone, and what it was reduced to has all figures but no events to draw; put the trace back "
    "beside it"
)

_T = TypeVar("_T")
_Key = tuple[str, int, int]


@dataclass
class _Kept:
    summary: TraceSummary
    size_bytes: int
    derived: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    computing: threading.RLock = field(default_factory=threading.RLock)


class Store:
    """Reader of one trace at a time; threads that request the same trace share one read.

    The lock on the cache is never held while a file is parsed, so cached traces remain available meanwhile.
    """

    def __init__(self, *, max_bytes: int = SUMMARIES_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._reasons: OrderedDict[_Key, str] = OrderedDict()
        self._read_lock = threading.RLock()
        self._kept_lock = threading.Lock()
        self.reads = 0
        """Number of traces read so far, for tests of the cache."""

    def reason(self, trace: Trace) -> str | None:
        """Return why the trace could not be read; None if it could, or was not tried."""
        return self._reasons.get(trace.key)

    def known(self, trace: Trace) -> TraceSummary | None:
        """Return the summary if it is cached, else None."""
        kept = self._kept.get(trace.key)
        return kept.summary if kept is not None else None

    def summary(self, trace: Trace) -> TraceSummary:
        """Return the summary of the trace, read now or earlier.

        Raises:
            TraceFileError: the trace cannot be read.
        """
        return self._get(trace).summary

    def derived(self, trace: Trace, what: Hashable, compute: Callable[[TraceSummary], _T]) -> _T:
        """Return a result computed from the summary and cached with it."""
        kept = self._get(trace)
        with kept.computing:
            if what not in kept.derived:
                kept.derived[what] = compute(kept.summary)
                while len(kept.derived) > DERIVED_MAX:
                    kept.derived.popitem(last=False)
            else:
                kept.derived.move_to_end(what)
            found: _T = kept.derived[what]
            return found

    def read_file(self, trace: Trace) -> TraceFile:
        """Read the trace with its own events, which are too large to cache: keep only derived results.

        Raises:
            TraceFileError: the trace cannot be read.
        """
        if trace.is_reduced:
            raise TraceFileError(_NO_EVENTS)
        with self._read_lock:
            return self._read(trace, lambda: read_trace(trace.path))

    def forget_old(self, catalog: Catalog) -> None:
        """Drop summaries of files that have changed or no longer exist."""
        current = {trace.key for trace in catalog.traces.values()}
        with self._kept_lock:
            for key in [key for key in self._kept if key not in current]:
                del self._kept[key]

    # -- reading --------------------------------------------------------------------------------------

    def _get(self, trace: Trace) -> _Kept:
        kept = self._cached(trace)
        if kept is not None:
            return kept
        with self._read_lock:
            kept = self._cached(trace)  # another thread may have read it meanwhile
            if kept is None:
                summary = self._read(trace, lambda: _summary(trace))
                kept = _Kept(summary, _size_bytes(summary))
                with self._kept_lock:
                    self._kept[trace.key] = kept
                    self._evict()
            return kept

    def _cached(self, trace: Trace) -> _Kept | None:
        with self._kept_lock:
            if trace.key in self._kept:
                self._kept.move_to_end(trace.key)
            return self._kept.get(trace.key)

    def _read(self, trace: Trace, read: Callable[[], _T]) -> _T:
        known = self._reasons.get(trace.key)
        if known is not None:
            raise TraceFileError(known)
        if not is_below(trace.path, trace.root):  # changed since the scan
            raise TraceFileError(OUTSIDE)
        self.reads += 1
        try:
            return read()
        except MoETraceError as error:
            self._store_reason(trace, str(error).removeprefix(f"{trace.path}: "))
        except MemoryError as error:  # more memory may be free another time
            raise TraceFileError("too large for the memory that this machine has left") from error
        except Exception as error:  # a hostile file must not crash the tab
            self._store_reason(trace, f"cannot be read ({type(error).__name__}: {error})")
        raise TraceFileError(self._reasons[trace.key])

    def _store_reason(self, trace: Trace, reason: str) -> None:
        self._reasons[trace.key] = reason[:1000]
        while len(self._reasons) > REASONS_MAX:
            self._reasons.popitem(last=False)

    def _evict(self) -> None:
        """Drop the least recently used summaries; the newest is kept, however large it is."""
        while len(self._kept) > 1 and sum(k.size_bytes for k in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)


def _summary(trace: Trace) -> TraceSummary:
    file = quickest(trace.path)
    return analyse([file if is_below(file, trace.root) else trace.path], label=str(trace.path))


def _size_bytes(summary: TraceSummary) -> int:
    """Return the approximate size of a summary: 2.5 kB per call besides its lists of counts (measured)."""
    counts = sum(len(lists.values) for lists in summary.calls.lists.values())
    return 2**20 + 16 * counts + 2500 * len(summary.calls)
