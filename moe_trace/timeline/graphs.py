"""Place calls that were made inside compiled code and CUDA graphs: at the launch of their graph.

    host saw the forward    enclosure: the range that our own hook opened round it, and the launches in it
    host saw nothing        the device's own count: copied at each mark, on the stream that it was counted on

Both are exact or refused; what is refused is counted with its reason. Inside a launch, router and experts
are told by the ids of their nodes, or by their positions in the chain that was captured.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_trace.data.schema import GraphMark, Placement, RangeKind, Recording, RoutingSample, Span
from moe_trace.timeline.graph_nodes import NodeFinder, NodeSpans
from moe_trace.timeline.launches import Launch, Launches, hull
from moe_trace.timeline.place import Placed
from moe_trace.timeline.scan import RangeEvent

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


def place_in_graphs(
    placed: Placed,
    recordings: Sequence[Recording],
    *,
    ranges: Sequence[RangeEvent],
    launches: Launches,
    base_time_ns: int,
    window: Span | None,
) -> Placed:
    """Place what was left without a place because it was made inside graphs.

    Args:
        placed: the outcome for all calls of this trace.
        recordings: of one or more tracers, which share no module path.
        ranges: our ranges in the trace.
        launches: of graphs and copies in the trace (`read_launches`).
        base_time_ns: the trace's `baseTimeNanoseconds`.
        window: what the profiler recorded, in trace time; None if the trace does not tell.
    """
    samples: list[RoutingSample] = []
    unplaced, untimed = Counter[str](), Counter[str]()
    owners = {router.name: i for i, recording in enumerate(recordings) for router in recording.routers}
    clock = TraceClock(base_time_ns, window)
    places = [_Places(one, placed.samples, ranges, launches, clock) for one in recordings]
    for sample in placed.samples:
        found = places[owners[sample.name]].of(sample) if sample.in_graph else None
        if isinstance(found, Placement):
            samples.append(replace(sample, placement=found))
            if "router" not in found.device:
                untimed[places[owners[sample.name]].why_untimed(found)] += 1
        elif found != OTHER_TRACE:
            samples.append(sample)
            unplaced.update([found] if found is not None else [])
    return replace(placed, samples=samples, unplaced=dict(unplaced), untimed=dict(untimed))


@dataclass(frozen=True)
class TraceClock:
    """From the host's clock to the trace's."""

    base_time_ns: int
    window: Span | None

    def time_us(self, time_ns: int) -> float:
        """On the trace's clock."""
        return (time_ns - self.base_time_ns) / 1000

    def covers(self, time_ns: int) -> bool:
        """Whether the trace was being recorded then."""
        if self.window is None:
            return True
        return self.window.start_us <= self.time_us(time_ns) <= self.window.end_us


class _Places:
    """The places of one tracer's calls."""

    def __init__(
        self,
        recording: Recording,
        samples: Sequence[RoutingSample],
        ranges: Sequence[RangeEvent],
        launches: Launches,
        clock: TraceClock,
    ) -> None:
        names = {router.name for router in recording.routers}
        own = [sample for sample in samples if sample.name in names and sample.in_graph]
        self._replays = _Replays(recording, launches, clock)
        self._forwards = _Forwards(ranges, {sample.thread for sample in own}, self._replays)
        self._segments = _Segments(own, self._replays)

    def of(self, sample: RoutingSample) -> Placement | str:
        """Its placement, or why it has none."""
        return (self._forwards if sample.host_start_ns else self._segments).placement(sample)

    def why_untimed(self, placement: Placement) -> str:
        """Why the router has no time of its own."""
        return self._replays.why_untimed(placement)


_Found = Placement | str
"""Or why there is no placement."""


class _Replays:
    """The launches of a trace, and what one tracer knows of their graphs."""

    def __init__(self, recording: Recording, launches: Launches, clock: TraceClock) -> None:
        self.recording, self.launches, self.clock = recording, launches, clock
        self.nodes = NodeFinder(recording)

    def placement(self, launch: Launch, name: str) -> Placement:
        """Of the router of that path, at its launch."""
        spans: dict[RangeKind, NodeSpans] = self.nodes.of(launch).get(name, {})
        device: dict[RangeKind, Span] = {kind: found.span for kind, found in spans.items()}
        whole = hull(item.span for item in launch.work)
        if whole is not None:
            device["graph"] = whole
        return Placement(
            host={"graph": launch.span},
            device=device,
            busy_us={kind: found.busy_us for kind, found in spans.items()},
        )

    def why_untimed(self, placement: Placement) -> str:
        """Why a router has no time of its own."""
        captured = self.recording.captured_graphs
        problems = [graph.problem for graph in captured if graph.problem is not None]
        if problems:
            return problems[0]
        return UNKNOWN_NODES if captured and "graph" in placement.device else FUSED


# -- forwards that the host saw -------------------------------------------------------------------------


class _Forwards:
    """The ranges round forwards, by thread, with the graphs launched inside each."""

    def __init__(self, ranges: Sequence[RangeEvent], threads: set[int], replays: _Replays) -> None:
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

    def placement(self, sample: RoutingSample) -> _Found:
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
        return self._inside[id(event)]

    def _whole(self, event: RangeEvent, inside: Sequence[Launch]) -> Placement:
        twins = self._twins.get(event.external_id, []) if event.external_id is not None else []
        device = hull([*twins, *(item.span for launch in inside for item in launch.work)])
        return Placement(host={"graph": event.span}, device={"graph": device} if device is not None else {})

    def _launch_of(
        self, name: str, event: RangeEvent, inside: Sequence[Launch], whole: Placement
    ) -> Launch | None:
        """The only launch with this router in it; or the only one, if nothing beside it can have written."""
        known = [launch for launch in inside if name in self._replays.nodes.of(launch)]
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


# -- forwards that only the device saw ------------------------------------------------------------------


class _Segments:
    """Which launch made which forward, by the counts between marks."""

    def __init__(self, samples: Sequence[RoutingSample], replays: _Replays) -> None:
        self._replays = replays
        self._found: dict[int, Launch | str] = {}
        unseen = sorted({s.graph_forward for s in samples if s.graph_forward is not None})
        for before, after in itertools.pairwise(replays.recording.graph_marks):
            mine = [forward for forward in unseen if before.forwards < forward <= after.forwards]
            covers = replays.clock.covers
            if mine and not (covers(before.start_ns) or covers(after.start_ns)):
                self._found.update(dict.fromkeys(mine, OTHER_TRACE))
            elif mine:
                self._found.update(self._match(before, after, mine))

    def placement(self, sample: RoutingSample) -> _Found:
        """At the launch that made the call."""
        forward = sample.graph_forward
        found = NO_MARK if forward is None else self._found.get(forward, NO_MARK)
        return found if isinstance(found, str) else self._replays.placement(found, sample.name)

    def _match(
        self, before: GraphMark, after: GraphMark, forwards: Sequence[int]
    ) -> dict[int, Launch] | dict[int, str]:
        """The launch of each forward; or for all of them why it cannot be told."""
        count = (after.forwards - before.forwards) - (after.seen - before.seen)
        mixed = after.seen != before.seen
        writers = MIXED if mixed and len(forwards) != count else self._writers(before, after, count)
        if isinstance(writers, str):
            return dict.fromkeys(forwards, writers)
        # The counter goes up by one with each, so a forward's number is its place among them.
        places = range(len(forwards)) if mixed else [forward - before.forwards - 1 for forward in forwards]
        return {forward: writers[place] for forward, place in zip(forwards, places, strict=True)}

    def _writers(self, before: GraphMark, after: GraphMark, count: int) -> list[Launch] | str:
        """The launches that ran the model in order of time, one for each forward that was counted."""
        start_us, end_us = map(self._replays.clock.time_us, (before.end_ns, after.start_ns))
        between = [
            launch for launch in self._replays.launches.graphs if start_us <= launch.span.start_us <= end_us
        ]
        if not between:
            return NO_LAUNCH
        streams = {self._stream(mark) for mark in (before, after)}
        if None in streams:
            return NO_MARK
        writers = self._of_the_model(between, count, Span(start_us, end_us - start_us))
        if isinstance(writers, str):
            return writers
        if len(streams) > 1 or any(launch.streams != streams for launch in writers):
            return OTHER_STREAM
        return sorted(writers, key=lambda launch: launch.work[0].span.start_us)

    def _of_the_model(self, between: Sequence[Launch], count: int, segment: Span) -> list[Launch] | str:
        known = [launch for launch in between if self._replays.nodes.of(launch)]
        if known:
            return known if len(known) == count else OTHER_COUNT
        recording = self._replays.recording
        able = list(between)
        if not recording.captured_graphs or recording.graphs_compiled:
            # Each decision is written by a scatter. Without one outside the graphs, all of them ran inside.
            able = [launch for launch in between if launch.scatters]
            last = hull([segment, *(item.span for launch in able for item in launch.work)])
            if not able or last is None or self._writes_beside(last):
                return UNKNOWN_GRAPH
        # Where all launches replay one and the same graph, each made as many forwards as the others: one, if
        # there are as many.
        alike = len({tuple(item.kernel for item in launch.work) for launch in able}) == 1
        return able if alike and len(able) == count else OTHER_COUNT

    def _writes_beside(self, segment: Span) -> bool:
        launches = self._replays.launches
        times_us = [*(time_us for _, time_us in launches.driver_launches), *launches.scatters_us]
        return any(segment.start_us <= time_us <= segment.end_us for time_us in times_us)

    def _stream(self, mark: GraphMark) -> tuple[Any, Any] | None:
        """The stream on which the mark's count was copied; None where the trace does not hold the copy."""
        start_us, end_us = map(self._replays.clock.time_us, (mark.start_ns, mark.end_ns))
        for launch in self._replays.launches.copies:
            if launch.tid == mark.thread and start_us <= launch.span.start_us <= end_us and launch.work:
                return launch.work[0].stream
        return None
