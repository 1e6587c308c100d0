"""Join samples to their ranges: by enclosure of the host clock, never by order, never shifting a clock."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from moe_trace.data.schema import Placement, RangeKind, RoutingSample, Span
from moe_trace.timeline.place.scan import RangeEvent


@dataclass(frozen=True)
class Placed:
    """The outcome of placing: every sample that took part, and what found no partner."""

    samples: list[RoutingSample]
    """The profiled samples of this trace's window; `placement` is None where no range was found."""
    samples_without_range: int
    ranges_without_sample: int
    without_range: dict[str, int] = field(default_factory=dict)
    """Samples whose range the trace does not hold, placed by the clock or not at all: why -> how many."""
    unplaced: dict[str, int] = field(default_factory=dict)
    """Calls inside graphs that have no place: why -> how many."""
    untimed: dict[str, int] = field(default_factory=dict)
    """Calls inside graphs that have one, but no latency of their router: why -> how many."""

    def losses(self) -> dict[str, Any]:
        """What the trace lacks, by the names that `Lost` has for it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "samples"}


def place_samples(
    samples: Iterable[RoutingSample],
    ranges: Iterable[RangeEvent],
    *,
    base_time_ns: int,
    window: Span | None,
    why: Callable[[RoutingSample], str] = lambda sample: "",
) -> Placed:
    """Give each profiled sample of the window the ranges of its router, experts and block.

    Args:
        samples: of one or more tracers; those that no profiler recorded are left out.
        ranges: our ranges as found in the trace, host and device.
        base_time_ns: the trace's `baseTimeNanoseconds`.
        window: what the profiler recorded, in trace time; None if the trace does not tell.
        why: the cause for a sample that has no range (`MissingRanges.why`).
    """
    timeline = _Timeline(ranges)
    placed = []
    causes = Counter[str]()
    used: set[int] = set()
    for sample in samples:
        start_us = (sample.host_start_ns - base_time_ns) / 1000
        unseen = sample.in_graph and sample.host_start_ns == 0  # when it ran is not known, only that it did
        if not sample.profiled or not (unseen or _inside(start_us, window)):
            continue
        router = timeline.enclosing("router", sample, start_us)
        if router is not None:
            used.add(id(router))
            placement: Placement | None = timeline.placement(router)
        elif sample.in_graph:  # it has no range of its own, and lost none
            placement = sample.placement
        elif (placement := timeline.fused(sample, start_us)) is None:
            causes[why(sample)] += 1
            placement = timeline.by_clock(sample, start_us)
        placed.append(replace(sample, placement=placement))
    without_range = sum(sample.placement is None and not sample.in_graph for sample in placed)
    return Placed(placed, without_range, len(timeline.routers) - len(used), dict(causes))


def _inside(time_us: float, window: Span | None) -> bool:
    return window is None or window.start_us <= time_us <= window.end_us


class _Timeline:
    """Ranges by kind, site and thread, in order of their start, with the device spans of each."""

    def __init__(self, ranges: Iterable[RangeEvent]) -> None:
        self._by_thread: dict[tuple[RangeKind, str, Any], list[RangeEvent]] = defaultdict(list)
        self._threads: dict[tuple[RangeKind, str], set[Any]] = defaultdict(set)
        self._seen: set[Any] = set()
        self._device: dict[Any, list[RangeEvent]] = defaultdict(list)
        self.routers: list[RangeEvent] = []
        for event in ranges:
            self._add(event)
        for events in self._by_thread.values():
            events.sort(key=lambda e: e.span.start_us)
        self._starts = {key: [e.span.start_us for e in events] for key, events in self._by_thread.items()}

    def _add(self, event: RangeEvent) -> None:
        if event.on_device:
            self._device[event.external_id].append(event)
            return
        self._by_thread[event.kind, event.site, event.tid].append(event)
        self._threads[event.kind, event.site].add(event.tid)
        self._seen.add(event.tid)
        if event.kind == "router":
            self.routers.append(event)

    def by_clock(self, sample: RoutingSample, start_us: float) -> Placement | None:
        """Where the host's clock has it, if no range of ours is of its thread: the profiler recorded no host
        events, or those of another thread. Where it has others, this one was lost."""
        if sample.thread in self._seen:
            return None
        taken_us = (sample.host_end_ns - sample.host_start_ns) / 1000
        return Placement(host={"router": Span(start_us, taken_us)}, device={})

    def enclosing(self, kind: RangeKind, sample: RoutingSample, time_us: float) -> RangeEvent | None:
        """The range of this sample's site that holds the time, on the sample's own thread if it has one."""
        threads = self._threads.get((kind, sample.site), set())
        # Another thread's range only in a trace that numbers its threads in another way altogether.
        for thread in [sample.thread] if sample.thread in self._seen else sorted(threads, key=str):
            event = self._at(kind, sample.site, thread, time_us)
            if event is not None:
                return event
        return None

    def _at(self, kind: RangeKind, site: str, thread: Any, time_us: float) -> RangeEvent | None:
        key = (kind, site, thread)
        index = bisect_right(self._starts.get(key, []), time_us) - 1
        if index < 0:
            return None
        event = self._by_thread[key][index]
        return event if time_us <= event.span.end_us else None

    def placement(self, router: RangeEvent) -> Placement:
        """The spans of the router's range, of the block round it and of the experts that follow it."""
        events: dict[RangeKind, RangeEvent] = {"router": router}
        block = self._at("block", router.site, router.tid, router.span.start_us)
        if block is not None:
            events["block"] = block
        experts = self._experts_after(router, block)
        if experts is not None:
            events["experts"] = experts
        host = {kind: event.span for kind, event in events.items()}
        device = {kind: span for kind, event in events.items() if (span := self._device_span(event))}
        if block is not None and device:
            # Kineto gives a kernel to the innermost annotation only, so the block's own leaves these out.
            device["block"] = _hull(list(device.values()))
        return Placement(host=host, device=device)

    def fused(self, sample: RoutingSample, time_us: float) -> Placement | None:
        """The block alone, where neither router nor experts ran as modules and the router took no time."""
        took_none = sample.host_end_ns == sample.host_start_ns
        block = self.enclosing("block", sample, time_us) if took_none else None
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
        limit = block.span.end_us if block is not None else self._next_router_start(router)
        return self._by_thread[key][index] if starts[index] < limit else None

    def _next_router_start(self, router: RangeEvent) -> float:
        starts = self._starts["router", router.site, router.tid]
        index = bisect_right(starts, router.span.start_us)
        return starts[index] if index < len(starts) else float("inf")

    def _device_span(self, event: RangeEvent) -> Span | None:
        """From the first kernel to the last of the range, over all streams that it launched on."""
        parts = self._device.get(event.external_id) if event.external_id is not None else None
        return _hull([part.span for part in parts]) if parts else None


def _hull(spans: Sequence[Span]) -> Span:
    if len(spans) == 1:
        return spans[0]
    start = min(span.start_us for span in spans)
    # The sum of a start and a duration is no more exact than the clock, which counts nanoseconds.
    return Span(start, round(max(span.end_us for span in spans) - start, 3))
