"""Reasons why a call has no range or no place in the trace, or its router no time."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import msgspec

from moe_trace.data.trace_json.stream import events_as
from moe_trace.data.trace_json.windows import EventBytes

NO_CPU = "the profiler was not asked for events of the host; add ProfilerActivity.CPU to activities="
NO_HOST_EVENTS = (
    "it holds no event of the host; add ProfilerActivity.CPU to activities=, or, where it is given, start "
    "the profiler on the thread that runs the model"
)
OTHER_THREAD = (
    "the profiler did not record the thread that they ran on; start it there, or give it "
    "experimental_config=torch.profiler._ExperimentalConfig(profile_all_threads=True)"
)
NO_ANNOTATIONS = (
    "it holds operators of their thread and no range of moe_trace, so another tool took the annotations out; "
    "merge into the trace as the profiler wrote it"
)
DROPPED = (
    "it holds those of other calls of the same thread, so theirs were dropped by the profiler or by a tool "
    "that saved the file; record fewer steps, or merge into the trace as the profiler wrote it"
)

# -- of calls inside graphs ------------------------------------------------------------------------------

NO_RANGE = (
    "the trace holds no range round their forward: its code was compiled while the profiler recorded, or the "
    "profiler dropped events; run a step before the profiler starts, and record fewer"
)
NO_LAUNCH = (
    "the trace holds no launch of a CUDA graph in their step, and the host saw no forward: compile the model "
    "itself rather than a function that calls it"
)
NO_MARK = (
    "the host saw neither their forward nor the counts before and after it in this trace: attach the tracer "
    "to the profiler before it starts, and call prof.step() after each replay"
)
OTHER_STREAM = (
    "their graphs ran on another stream than the one that counts them: call prof.step() where the stream of "
    "the replays is current"
)
OTHER_COUNT = (
    "the device counted another number of forwards than there are launches of their graphs in the step: call "
    "prof.step() after each replay"
)
MIXED = (
    "replays and forwards that the host saw are mixed in one step, and some were not kept: call prof.step() "
    "between them"
)
UNKNOWN_GRAPH = (
    "which launches wrote them cannot be told: the graphs were made by torch.compile round a function that "
    "calls the model, and something beside them may have written too; compile the model itself"
)
OTHER_TRACE = "they belong to another trace of the same run"
UNKNOWN_NODES = (
    "their graph was not captured while the tracer was on, holds the router twice, or runs on several streams"
)
FUSED = "compiled code fuses the router with its neighbours"

_HOST_CATEGORIES = frozenset({"cpu_op", "user_annotation", "python_function", "cpu_instant_event"})


class MissingRanges:
    """Reasons for missing ranges in one trace.

    Args:
        events: events of the trace; read once, when there is a call to explain.
        ranged_threads: threads with ranges of moe_trace.
        activities: names of the profiler's activities; None if unknown, as for a file.
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
        """Return why the trace has no range of a call on this thread."""
        if thread in self._ranged_threads:
            return DROPPED
        if self._activities is not None and "CPU" not in self._activities:
            return NO_CPU
        if not self._host_threads and self._activities is None:
            return NO_HOST_EVENTS
        return NO_ANNOTATIONS if thread in self._host_threads else OTHER_THREAD

    def why_no_forward(self, thread: int) -> str:
        """Return why there is no range of the forward of a call inside a graph."""
        cause = self.why(thread)
        return cause if cause in (NO_CPU, NO_HOST_EVENTS, OTHER_THREAD) else NO_RANGE

    @cached_property
    def _host_threads(self) -> frozenset[Any]:
        events = events_as(_ThreadEvent, self._events)
        return frozenset(event.tid for event in events if event.cat in _HOST_CATEGORIES)


class _ThreadEvent(msgspec.Struct, gc=False):
    cat: str | None = None
    tid: int | str | None = None
