"""Why a trace holds no range of a call that a profiler saw: told by what it holds of the call's thread."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import msgspec

from moe_trace.data.trace_json.stream import events_as
from moe_trace.data.trace_json.windows import EventBytes
from moe_trace.timeline.correlate.reasons import (
    DROPPED,
    NO_ANNOTATIONS,
    NO_CPU,
    NO_HOST_EVENTS,
    NO_RANGE,
    OTHER_THREAD,
)

_HOST_CATEGORIES = frozenset({"cpu_op", "user_annotation", "python_function", "cpu_instant_event"})


class MissingRanges:
    """The causes in one trace.

    Args:
        events: of the trace; read when there is a call to explain, once.
        ranged_threads: on which our ranges stand.
        activities: names of the profiler's activities; None where nobody knows, as for a file.
    """

    def __init__(
        self,
        events: EventBytes,
        ranged_threads: Collection[Any],
        activities: Collection[str] | None = None,
    ) -> None:
        self._events = events
        self._ranged_threads = ranged_threads
        self._activities = activities

    def why(self, thread: int) -> str:
        """Why the trace holds no range of a call on this thread."""
        if thread in self._ranged_threads:
            return DROPPED
        if self._activities is not None and "CPU" not in self._activities:
            return NO_CPU
        if not self._host_threads and self._activities is None:
            return NO_HOST_EVENTS
        return NO_ANNOTATIONS if thread in self._host_threads else OTHER_THREAD

    def why_no_forward(self, thread: int) -> str:
        """The same for a call inside a graph, which has the range of its forward."""
        cause = self.why(thread)
        return cause if cause in (NO_CPU, NO_HOST_EVENTS, OTHER_THREAD) else NO_RANGE

    @cached_property
    def _host_threads(self) -> frozenset[Any]:
        """Threads with events of the host."""
        events = events_as(_OfThread, self._events)
        return frozenset(event.tid for event in events if event.cat in _HOST_CATEGORIES)


class _OfThread(msgspec.Struct, gc=False):
    cat: str | None = None
    tid: int | str | None = None
