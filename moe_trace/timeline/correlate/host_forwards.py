"""Place the forwards that the host saw: by the range round each, and the graphs launched inside it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from moe_trace.data.schema import Placement, RoutingSample, Span
from moe_trace.timeline.correlate.launches import Launch, hull
from moe_trace.timeline.correlate.reasons import NO_RANGE
from moe_trace.timeline.correlate.replays import Found, Replays
from moe_trace.timeline.correlate.scan import RangeEvent


class HostForwards:
    """The ranges round forwards, by thread, with the graphs launched inside each."""

    def __init__(self, ranges: Sequence[RangeEvent], threads: set[int], replays: Replays) -> None:
        self._replays = replays
        # Another thread's range only in a trace that numbers its threads in another way altogether.
        self._same_numbers = any(event.tid in threads for event in ranges if not event.on_device)
        self._ranges: dict[Any, list[RangeEvent]] = defaultdict(list)
        self._twins: dict[Any, list[Span]] = defaultdict(list)
        for event in ranges:
            if event.kind == "graph" and event.on_device:
                self._twins[event.external_id].append(event.span)
            elif event.kind == "graph":
                self._ranges[event.tid].append(event)
        for events in self._ranges.values():
            events.sort(key=lambda event: event.span.start_us)
        self._inside: dict[int, list[Launch]] = {}

    def placement(self, sample: RoutingSample) -> Found:
        """At the launch that made the call where that can be told, else the whole forward."""
        time_us = self._replays.clock.time_us(sample.host_start_ns)
        threads = [sample.thread] if self._same_numbers else sorted(self._ranges, key=str)
        event = next((e for t in threads if (e := self._enclosing(t, time_us)) is not None), None)
        if event is None:
            return NO_RANGE
        inside = self._launches_in(event)
        whole = self._whole(event, inside)
        launch = self._launch_of(sample.name, event, inside, whole)
        return whole if launch is None else self._replays.placement(launch, sample.name)

    def _enclosing(self, thread: Any, time_us: float) -> RangeEvent | None:
        """The innermost: the last to start of those that hold the time."""
        events = self._ranges.get(thread, [])
        index = bisect_right(events, time_us, key=lambda event: event.span.start_us) - 1
        while index >= 0 and events[index].span.end_us < time_us:
            index -= 1
        return events[index] if index >= 0 else None

    def _launches_in(self, event: RangeEvent) -> list[Launch]:
        if id(event) not in self._inside:
            self._inside[id(event)] = [
                launch
                for launch in self._replays.launches.graphs
                if launch.tid == event.tid and _holds(event.span, launch.span)
            ]
            self._replays.know_forward(self._inside[id(event)])
        return self._inside[id(event)]

    def _whole(self, event: RangeEvent, inside: Sequence[Launch]) -> Placement:
        twins = self._twins.get(event.external_id, []) if event.external_id is not None else []
        device = hull([*twins, *(item.span for launch in inside for item in launch.work)])
        return Placement(host={"graph": event.span}, device={"graph": device} if device is not None else {})

    def _launch_of(
        self, name: str, event: RangeEvent, inside: Sequence[Launch], whole: Placement
    ) -> Launch | None:
        """The only launch with this router in it; or the only one, if nothing beside it can have written."""
        known = [launch for launch in inside if name in self._replays.parts_of(launch)]
        if len(known) == 1:
            return known[0]
        if known or len(inside) != 1 or "graph" not in whole.device:
            return None
        launches, device = self._replays.launches, whole.device["graph"]
        beside = any(
            tid == event.tid and event.span.start_us <= time_us <= event.span.end_us
            for tid, time_us in launches.driver_launches
        ) or any(device.start_us <= time_us <= device.end_us for time_us in launches.scatters_us)
        return None if beside else inside[0]


def _holds(outer: Span, inner: Span) -> bool:
    return outer.start_us <= inner.start_us and inner.end_us <= outer.end_us
