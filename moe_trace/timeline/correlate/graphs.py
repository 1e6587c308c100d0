"""Place calls made inside compiled code and CUDA graphs at the launch of their graph.

    host saw the forward    by enclosure: the range that moe_trace's hook opened around it, and launches in it
    host saw nothing        by the device's own count, copied at each mark, on the stream that it counts on

Both are exact or rejected; rejections are counted by reason. Inside a launch, router and experts are
identified by the ids of their nodes, or by their positions in the captured chain.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe_trace.data.calls.placements import Places
from moe_trace.data.calls.table import CallTable, routers_timed
from moe_trace.data.schema import GraphMark, Placement, Recording, RoutingSample, Span
from moe_trace.timeline.correlate.calls import Placed, TraceClock
from moe_trace.timeline.correlate.launches import Launch, Launches, hull
from moe_trace.timeline.correlate.reasons import (
    MIXED,
    NO_LAUNCH,
    NO_MARK,
    NO_RANGE,
    OTHER_COUNT,
    OTHER_STREAM,
    OTHER_TRACE,
    UNKNOWN_GRAPH,
    MissingRanges,
)
from moe_trace.timeline.correlate.replays import Found, Replays
from moe_trace.timeline.correlate.scan import RangeEvent


def place_in_graphs(
    placed: Placed,
    recordings: Sequence[Recording],
    *,
    ranges: Sequence[RangeEvent],
    launches: Launches,
    missing: MissingRanges,
    clock: TraceClock,
    timed: Callable[[CallTable], CallTable] = lambda calls: calls,
) -> Placed:
    """Place the calls that have no place because they were made inside graphs.

    Args:
        placed: the result for all calls of this trace.
        recordings: from tracers that share no module path.
        launches: launches of graphs and copies in the trace (`read_launches`).
        timed: adds times of routers that their place does not give.
    """
    samples, found, why_untimed = list(placed.samples), dict[int, Found](), dict[int, str]()
    for recording in recordings:
        names = {router.name for router in recording.routers}
        own = {row: sample for row, sample in enumerate(samples) if sample.in_graph and sample.name in names}
        replays = Replays(recording, launches, clock)
        on_host = _HostForwards(ranges, {sample.thread for sample in own.values()}, replays)
        on_device = _DeviceForwards(own.values(), replays)
        for row, sample in own.items():
            place = found[row] = (on_host if sample.host_start_ns else on_device).placement(sample)
            if isinstance(place, Placement):
                why_untimed[row] = replays.why_untimed(place)
            elif place == NO_RANGE:
                found[row] = missing.why_no_forward(sample.thread)
    rows = [row for row in range(len(samples)) if found.get(row) != OTHER_TRACE]
    known = {row: place for row, place in found.items() if isinstance(place, Placement)}
    places = [known.get(row, samples[row].placement) for row in rows]
    table = placed.samples.take(np.array(rows, np.int64))
    table = timed(replace(table, places=Places.of(places, len(rows))))
    has_time = zip(rows, routers_timed(table), strict=True)
    untimed = [why_untimed.get(row) for row, has in has_time if not has]
    unplaced = [why for why in found.values() if isinstance(why, str) and why != OTHER_TRACE]
    return replace(placed, samples=table, unplaced=_counts(unplaced), untimed=_counts(filter(None, untimed)))


def _counts(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons))


class _HostForwards:
    """Ranges around forwards, by thread, with the graphs launched inside each."""

    def __init__(self, ranges: Sequence[RangeEvent], threads: set[int], replays: Replays) -> None:
        self._replays = replays
        # Use another thread's range only if the trace numbers its threads differently.
        self._same_numbers = any(event.tid in threads for event in ranges if not event.on_device)
        self._ranges: dict[Any, list[RangeEvent]] = defaultdict(list)
        self._device_spans: dict[Any, list[Span]] = defaultdict(list)
        for event in ranges:
            if event.kind == "graph" and event.on_device:
                self._device_spans[event.external_id].append(event.span)
            elif event.kind == "graph":
                self._ranges[event.tid].append(event)
        for events in self._ranges.values():
            events.sort(key=lambda event: event.span.start_us)
        self._inside: dict[int, list[Launch]] = {}

    def placement(self, sample: RoutingSample) -> Found:
        """Return the place at the launch that made the call if it is known, else the whole forward."""
        time_us = self._replays.clock.time_us(sample.host_start_ns)
        threads = [sample.thread] if self._same_numbers else sorted(self._ranges, key=str)
        event = next((e for t in threads if (e := self._enclosing(t, time_us)) is not None), None)
        if event is None:
            return NO_RANGE
        inside = self._launches_in(event)
        forward = self._placement_of(event, inside)
        launch = self._launch_of(sample.name, event, inside, forward)
        return forward if launch is None else self._replays.placement(launch, sample.name)

    def _enclosing(self, thread: Any, time_us: float) -> RangeEvent | None:
        """Return the innermost range that contains the time: the last of them to start."""
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

    def _placement_of(self, event: RangeEvent, inside: Sequence[Launch]) -> Placement:
        device_spans = self._device_spans.get(event.external_id, []) if event.external_id is not None else []
        device = hull([*device_spans, *(item.span for launch in inside for item in launch.work)])
        return Placement(host={"graph": event.span}, device={"graph": device} if device is not None else {})

    def _launch_of(
        self, name: str, event: RangeEvent, inside: Sequence[Launch], forward: Placement
    ) -> Launch | None:
        """Return the only launch with this router in it, or the only one if nothing else can have written."""
        known = [launch for launch in inside if name in self._replays.parts_of(launch)]
        if len(known) == 1:
            return known[0]
        if known or len(inside) != 1 or "graph" not in forward.device:
            return None
        written_elsewhere = self._replays.launches.written_beside(
            event.span, forward.device["graph"], event.tid
        )
        return None if written_elsewhere else inside[0]


def _holds(outer: Span, inner: Span) -> bool:
    return outer.start_us <= inner.start_us and inner.end_us <= outer.end_us


class _DeviceForwards:
    """Launches of the forwards counted between marks."""

    def __init__(self, samples: Iterable[RoutingSample], replays: Replays) -> None:
        self._replays = replays
        self._found: dict[int, Launch | str] = {}
        unseen = sorted({s.graph_forward for s in samples if s.graph_forward is not None})
        for before, after in itertools.pairwise(replays.recording.graph_marks):
            forwards = [forward for forward in unseen if before.forwards < forward <= after.forwards]
            covers = replays.clock.covers
            if forwards and not (covers(before.start_ns) or covers(after.start_ns)):
                self._found.update(dict.fromkeys(forwards, OTHER_TRACE))
            elif forwards:
                self._found.update(self._match(before, after, forwards))

    def placement(self, sample: RoutingSample) -> Found:
        """Return the place at the launch that made the call."""
        forward = sample.graph_forward
        found = NO_MARK if forward is None else self._found.get(forward, NO_MARK)
        return found if isinstance(found, str) else self._replays.placement(found, sample.name)

    def _match(
        self, before: GraphMark, after: GraphMark, forwards: Sequence[int]
    ) -> dict[int, Launch] | dict[int, str]:
        """Return the launch of each forward, or for all of them the reason why it is unknown."""
        count = (after.forwards - before.forwards) - (after.seen - before.seen)
        mixed = after.seen != before.seen
        writers = MIXED if mixed and len(forwards) != count else self._writers(before, after, count)
        if isinstance(writers, str):
            return dict.fromkeys(forwards, writers)
        # The counter increases by one per forward, so a forward's number is its position.
        places = range(len(forwards)) if mixed else [forward - before.forwards - 1 for forward in forwards]
        return {forward: writers[place] for forward, place in zip(forwards, places, strict=True)}

    def _writers(self, before: GraphMark, after: GraphMark, count: int) -> list[Launch] | str:
        """Return the launches that ran the model in order of time, one for each counted forward."""
        start_us, end_us = map(self._replays.clock.time_us, (before.end_ns, after.start_ns))
        between = [
            launch for launch in self._replays.launches.graphs if start_us <= launch.span.start_us <= end_us
        ]
        if not between:
            return NO_LAUNCH
        streams = {self._stream(mark) for mark in (before, after)}
        if None in streams:
            return NO_MARK
        writers = self._model_launches(between, count, Span(start_us, end_us - start_us))
        if isinstance(writers, str):
            return writers
        if len(streams) > 1 or any(launch.streams != streams for launch in writers):
            return OTHER_STREAM
        return sorted(writers, key=lambda launch: launch.work[0].span.start_us)

    def _model_launches(self, between: Sequence[Launch], count: int, segment: Span) -> list[Launch] | str:
        known = [launch for launch in between if self._replays.parts_of(launch)]
        if known:
            return known if len(known) == count else OTHER_COUNT
        recording = self._replays.recording
        candidates = list(between)
        if not recording.captured_graphs or recording.graphs_compiled:
            # A scatter writes each decision. If there is none outside the graphs, all of them ran inside.
            candidates = [launch for launch in between if launch.scatters]
            last = hull([segment, *(item.span for launch in candidates for item in launch.work)])
            if not candidates or last is None or self._replays.launches.written_beside(last, last):
                return UNKNOWN_GRAPH
        # If all launches replay the same graph, each made equally many forwards: one, if the numbers
        # are equal.
        alike = len({tuple(item.kernel for item in launch.work) for launch in candidates}) == 1
        return candidates if alike and len(candidates) == count else OTHER_COUNT

    def _stream(self, mark: GraphMark) -> tuple[Any, Any] | None:
        """Return the stream on which the mark's count was copied; None if the copy is not in the trace."""
        start_us, end_us = map(self._replays.clock.time_us, (mark.start_ns, mark.end_ns))
        for launch in self._replays.launches.copies:
            if launch.tid == mark.thread and start_us <= launch.span.start_us <= end_us and launch.work:
                return launch.work[0].stream
        return None
