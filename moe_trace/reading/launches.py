"""Which kernels were launched inside which host interval: joined by the correlation of launch and kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.reading.events import EventTable, Kind
from moe_trace.schema import RoutingSample, Span, range_name
from moe_trace.summary import SampleKey


@dataclass(frozen=True)
class Launches:
    """Launches that have kernels, sorted by thread and time; a launch may have several (a graph)."""

    thread: npt.NDArray[np.int32]
    start_us: npt.NDArray[np.float64]
    end_us: npt.NDArray[np.float64]
    device_start_us: npt.NDArray[np.float64]
    """Start of the launch's first kernel."""
    device_end_us: npt.NDArray[np.float64]
    busy_us: npt.NDArray[np.float64]
    """Sum of the launch's kernels."""
    kernels: npt.NDArray[np.int64]

    def within(self, thread: int, span: Span) -> slice:
        """The launches of a thread that start inside a span."""
        first = np.searchsorted(self.thread, thread, "left")
        last = np.searchsorted(self.thread, thread, "right")
        starts = self.start_us[first:last]
        return slice(
            int(first + np.searchsorted(starts, span.start_us, "left")),
            int(first + np.searchsorted(starts, span.end_us, "right")),
        )


def find_launches(events: EventTable) -> Launches:
    """Join each launch with its kernels."""
    host = events.select((events.kind == Kind.LAUNCH) & (events.link >= 0))
    device = events.select((events.kind == Kind.DEVICE) & (events.link >= 0))
    order = np.argsort(device.link, kind="stable")
    ids, first, counts = np.unique(device.link[order], return_index=True, return_counts=True)
    if not len(ids):
        host, ids = host.select(np.zeros(len(host), dtype=bool)), np.zeros(1, dtype=np.int64)
        first = counts = np.zeros(0, dtype=np.int64)
    at = np.minimum(np.searchsorted(ids, host.link), len(ids) - 1)
    with_kernels = ids[at] == host.link
    host, at = host.select(with_kernels), at[with_kernels]
    by_time = np.lexsort((host.start_us, host.thread))
    host, at = host.select(by_time), at[by_time]
    starts, ends, durations = (
        column[order] for column in (device.start_us, device.end_us, device.duration_us)
    )
    return Launches(
        thread=host.thread,
        start_us=host.start_us,
        end_us=host.end_us,
        device_start_us=np.minimum.reduceat(starts, first)[at] if len(first) else starts[:0],
        device_end_us=np.maximum.reduceat(ends, first)[at] if len(first) else ends[:0],
        busy_us=np.add.reduceat(durations, first)[at] if len(first) else durations[:0],
        kernels=counts[at],
    )


class RangeThreads:
    """The thread (an index of the table) on which a range of ours was recorded."""

    def __init__(self, events: EventTable) -> None:
        ours = events.select(events.kind == Kind.RANGE)
        self._thread = {
            (events.names[name], round(float(start), 3)): int(thread)
            for name, start, thread in zip(ours.name, ours.start_us, ours.thread, strict=True)
        }

    def of(self, sample: RoutingSample) -> int | None:
        """None where the trace no longer holds the range."""
        if sample.placement is None or "router" not in sample.placement.host:
            return None
        start_us = sample.placement.host["router"].start_us
        return self._thread.get((range_name("router", sample.site), round(start_us, 3)))


def router_busy_us(
    samples: Sequence[RoutingSample], events: EventTable, launches: Launches
) -> dict[SampleKey, float]:
    """Kernel time launched inside each router's host range; empty where the trace has no kernels."""
    if not (events.kind == Kind.DEVICE).any():
        return {}
    threads = RangeThreads(events)
    busy = {}
    for sample in samples:
        thread = threads.of(sample)
        if thread is not None and sample.placement is not None:
            inside = launches.within(thread, sample.placement.host["router"])
            busy[sample.name, sample.call] = float(launches.busy_us[inside].sum())
    return busy
