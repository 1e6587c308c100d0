"""Join samples to their ranges by enclosure on the host clock, never by order; no clock is shifted."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from moe_trace.data.calls.placements import Places
from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import Placement, RangeKind, RoutingSample, Span
from moe_trace.timeline.correlate.launches import hull
from moe_trace.timeline.correlate.scan import RangeEvent


@dataclass(frozen=True)
class TraceClock:
    """Conversion from the host's clock to the trace's."""

    base_time_ns: int
    window: Span | None
    """Time span recorded by the profiler; None if the trace does not have it."""

    def time_us(self, time_ns: int) -> float:
        """Return the time on the trace's clock."""
        return (time_ns - self.base_time_ns) / 1000

    def covers(self, time_ns: int) -> bool:
        """Return whether the trace was being recorded at that time."""
        return self.window is None or self.window.holds(self.time_us(time_ns))


@dataclass(frozen=True)
class Placed:
    """Result of placement: every profiled sample of the trace, and counts of what was not matched."""

    samples: CallTable
    """The profiled samples in this trace's window; `placement` is None where no range was found."""
    samples_without_range: int
    ranges_without_sample: int
    without_range: dict[str, int] = field(default_factory=dict)
    """Samples whose range is missing from the trace, placed by the clock or not at all, by reason."""
    unplaced: dict[str, int] = field(default_factory=dict)
    """Number of calls inside graphs without a place, by reason."""
    untimed: dict[str, int] = field(default_factory=dict)
    """Number of calls inside graphs with a place but no router latency, by reason."""

    def lost(self) -> dict[str, Any]:
        """Return what the trace lacks, under the field names of `Lost`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "samples"}


def place_samples(
    samples: Sequence[RoutingSample],
    ranges: Iterable[RangeEvent],
    *,
    base_time_ns: int,
    window: Span | None,
    why: Callable[[int], str] = lambda thread: "",
) -> Placed:
    """Join each profiled sample in the window to the ranges of its router, experts and block.

    Args:
        samples: from one or more tracers; those taken without a profiler are left out.
        ranges: moe_trace's ranges found in the trace, host and device.
        base_time_ns: the trace's `baseTimeNanoseconds`.
        window: time span recorded by the profiler, in trace time; None if unknown.
        why: returns why a sample of a thread has no range (`MissingRanges.why`).
    """
    table, clock = CallTable.of(samples), TraceClock(base_time_ns, window)
    unseen = table.in_graph & (table.host_start_ns == 0)  # it is unknown when it ran
    covered = np.array([clock.covers(start_ns) for start_ns in table.host_start_ns.tolist()], bool)
    table = table.take(np.flatnonzero(table.profiled & (unseen | covered)))
    join = _Join(_Timeline(ranges), why)
    places = Places.of(join.placements(table, clock), len(table))
    without_range = int((~places.placed & ~table.in_graph).sum())
    unused = len(join.timeline.routers) - len(join.used)
    return Placed(replace(table, places=places), without_range, unused, dict(join.causes))


@dataclass(frozen=True)
class _Join:
    timeline: _Timeline
    why: Callable[[int], str]
    causes: Counter[str] = field(default_factory=Counter)
    used: set[int] = field(default_factory=set)
    """Identities of the router ranges that contain a sample."""

    def placements(self, table: CallTable, clock: TraceClock) -> Iterator[Placement | None]:
        """Yield each row's placement: thousands of small objects alive at once would trigger the garbage
        collector, which also traverses the user's model."""
        kept = table.places.to_placements() if table.in_graph.any() else ()
        taken_ns = table.host_end_ns - table.host_start_ns
        columns = (table.host_start_ns, table.site, table.thread, taken_ns, table.in_graph)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (start_ns, site, thread, taken_ns, in_graph) in enumerate(rows):
            start_us = clock.time_us(start_ns)
            router = self.timeline.enclosing("router", site, thread, start_us)
            if router is not None:
                self.used.add(id(router))
                yield self.timeline.placement(router)
            elif in_graph:  # has no range of its own that could be missing
                yield kept[row]
            else:
                # If neither router nor experts ran as modules, the router took no time.
                block = None if taken_ns else self.timeline.block(site, thread, start_us)
                self.causes.update([] if block else [self.why(thread)])
                yield block or self.timeline.by_clock(thread, Span(start_us, taken_ns / 1000))


class _Timeline:
    """Ranges by kind, site and thread, in order of their start, with the device spans of each."""

    def __init__(self, ranges: Iterable[RangeEvent]) -> None:
        self._by_thread: dict[tuple[RangeKind, str, Any], list[RangeEvent]] = defaultdict(list)
        self._device: dict[Any, list[RangeEvent]] = defaultdict(list)
        self.routers: list[RangeEvent] = []
        for event in ranges:
            self._add(event)
        self._threads: dict[tuple[RangeKind, str], set[Any]] = defaultdict(set)
        for (kind, site, tid), events in self._by_thread.items():
            events.sort(key=lambda e: e.span.start_us)
            self._threads[kind, site].add(tid)
        self._threads_with_ranges = {tid for _, _, tid in self._by_thread}
        self._starts = {key: [e.span.start_us for e in events] for key, events in self._by_thread.items()}

    def _add(self, event: RangeEvent) -> None:
        if event.on_device:
            self._device[event.external_id].append(event)
            return
        self._by_thread[event.kind, event.site, event.tid].append(event)
        if event.kind == "router":
            self.routers.append(event)

    def by_clock(self, thread: int, taken: Span) -> Placement | None:
        """Return the place by the host's clock, if no range of moe_trace is on its thread.

        The profiler then recorded no host events, or another thread's. If there are ranges, this one was
        lost.
        """
        return None if thread in self._threads_with_ranges else Placement(host={"router": taken}, device={})

    def enclosing(self, kind: RangeKind, site: str, thread: int, time_us: float) -> RangeEvent | None:
        """Return the site's range that contains the time, on the sample's own thread if that has ranges."""
        if thread in self._threads_with_ranges:
            return self._range_at(kind, site, thread, time_us)
        # Use another thread's range only if the trace numbers its threads differently.
        for other in sorted(self._threads.get((kind, site), ()), key=str):
            event = self._range_at(kind, site, other, time_us)
            if event is not None:
                return event
        return None

    def _range_at(self, kind: RangeKind, site: str, thread: Any, time_us: float) -> RangeEvent | None:
        key = (kind, site, thread)
        index = bisect_right(self._starts.get(key, []), time_us) - 1
        if index < 0:
            return None
        event = self._by_thread[key][index]
        return event if time_us <= event.span.end_us else None

    def placement(self, router: RangeEvent) -> Placement:
        """Return the spans of the router's range, its enclosing block and the experts that follow it."""
        events: dict[RangeKind, RangeEvent] = {"router": router}
        block = self._range_at("block", router.site, router.tid, router.span.start_us)
        if block is not None:
            events["block"] = block
        experts = self._experts_after(router, block)
        if experts is not None:
            events["experts"] = experts
        host = {kind: event.span for kind, event in events.items()}
        device = {kind: span for kind, event in events.items() if (span := self._device_span(event))}
        all_work = hull(device.values())
        if block is not None and all_work is not None:
            # Kineto assigns a kernel to the innermost annotation only, so the block's own span omits these.
            device["block"] = all_work
        return Placement(host=host, device=device)

    def block(self, site: str, thread: int, time_us: float) -> Placement | None:
        """Return only the block that contains the time."""
        block = self.enclosing("block", site, thread, time_us)
        if block is None:
            return None
        device = self._device_span(block)
        return Placement(host={"block": block.span}, device={"block": device} if device else {})

    def _experts_after(self, router: RangeEvent, block: RangeEvent | None) -> RangeEvent | None:
        key: tuple[RangeKind, str, Any] = ("experts", router.site, router.tid)
        starts = self._starts.get(key, [])
        index = bisect_right(starts, router.span.end_us)
        if index == len(starts):
            return None
        if block is not None:
            limit = block.span.end_us
        else:  # before the router is called again
            routers = self._starts["router", router.site, router.tid]
            following = bisect_right(routers, router.span.start_us)
            limit = routers[following] if following < len(routers) else math.inf
        return self._by_thread[key][index] if starts[index] < limit else None

    def _device_span(self, event: RangeEvent) -> Span | None:
        """Return the span from the range's first kernel to its last, over all its streams."""
        parts = self._device.get(event.external_id, ()) if event.external_id is not None else ()
        return hull(part.span for part in parts)
