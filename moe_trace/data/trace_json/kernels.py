"""Kernels launched inside host intervals, joined by the correlation of launch and kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import Span
from moe_trace.data.trace_json.coverage import Coverage
from moe_trace.data.trace_json.decoding import NO_LINK
from moe_trace.data.trace_json.events import EventTable, Kind, bounds_ns, find_links

_EARLY_NS = 10**6
"""More than the difference between the clocks of host and device."""
_MAX_EARLY_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Kernels:
    """Kernels, copies and memsets whose launch is in the trace, sorted by thread and time of the launch."""

    launch_thread: npt.NDArray[np.int32]
    launch_ns: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    duration_ns: npt.NDArray[np.int64]
    name: npt.NDArray[np.int32]
    """Index into the table's names."""
    link: npt.NDArray[np.int64]
    stream: npt.NDArray[np.int32]
    """Index into the table's threads: the device and its stream."""
    coverage: Coverage
    """Share of the trace's kernels that these are."""

    def within(self, thread: int, span: Span) -> slice:
        """Return the kernels that a thread launched inside a span."""
        return self.within_ns(thread, *bounds_ns(span))

    def within_ns(self, thread: int, begin: int, end: int) -> slice:
        """Return the kernels launched between two times in nanoseconds, both included."""
        first = int(np.searchsorted(self.launch_thread, thread, "left"))
        last = int(np.searchsorted(self.launch_thread, thread, "right"))
        launches = self.launch_ns[first:last]
        return slice(
            first + int(np.searchsorted(launches, begin, "left")),
            first + int(np.searchsorted(launches, end, "right")),
        )


def find_kernels(events: EventTable) -> Kernels:
    """Join each kernel with its launch by their correlation; the events are of one process.

    A kernel that begins before its launch has an invalid time and is not joined, provided there are few of
    them. If there are many, the device's clock is offset from the host's, which does not affect the join.
    """
    launches = events.select((events.kind == Kind.LAUNCH) & (events.link != NO_LINK))
    device_events = events.select(events.kind == Kind.DEVICE)
    launch_rows = find_links(device_events.link, launches.link)
    known = launch_rows >= 0
    early = known.copy()
    early[known] = device_events.start_ns[known] < launches.start_ns[launch_rows[known]] - _EARLY_NS
    if early.sum() <= max(1, _MAX_EARLY_SHARE * len(device_events)):
        known &= ~early
    device, launch_rows = device_events.select(known), launch_rows[known]
    order = np.lexsort((device.start_ns, launches.start_ns[launch_rows], launches.thread[launch_rows]))
    launch_rows = launch_rows[order]
    return Kernels(
        launch_thread=launches.thread[launch_rows],
        launch_ns=launches.start_ns[launch_rows],
        start_ns=device.start_ns[order],
        duration_ns=device.duration_ns[order],
        name=device.name[order],
        link=device.link[order],
        stream=device.thread[order],
        coverage=Coverage(
            joined=len(device),
            total=len(device_events),
            joined_ns=int(device.duration_ns.sum()),
            total_ns=int(device_events.duration_ns.sum()),
        ),
    )
