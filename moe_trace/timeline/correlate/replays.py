"""Identify the kernels of routers and of experts in each replay of a graph in a trace.

By node ids, if the graph was captured with annotations. Else by positions: during a manual capture, the hooks
noted at which nodes each router and its experts began and ended. In a plain chain the n-th event of a replay
is the n-th node; the grids and blocks of all kernels up to the last noted one must match those of the replay.
If the profiler does not show copies and memsets, only the kernels are compared. Graphs of compiled code: by
the compiler's provenance of each kernel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.schema import (
    RANGE_NAME,
    CapturedGraph,
    Placement,
    RangeKind,
    Recording,
    graph_digest,
)
from moe_trace.timeline.correlate.calls import TraceClock
from moe_trace.timeline.correlate.compiled_launches import Fit, LaunchMatcher
from moe_trace.timeline.correlate.launches import DeviceWork, Launch, Launches, hull
from moe_trace.timeline.correlate.reasons import FUSED, UNKNOWN_NODES

Found = Placement | str
"""A placement, or the reason why there is none."""
Parts = dict[str, dict[RangeKind, list[DeviceWork]]]
"""Work of each router, by module path, and of its experts in one replay."""


class Replays:
    """The launches of a trace, with what one tracer recorded about their graphs."""

    def __init__(self, recording: Recording, launches: Launches, clock: TraceClock) -> None:
        self.recording, self.launches, self.clock = recording, launches, clock
        forwards = [graph for graph in recording.compiled_graphs if not graph.backward]
        self._matcher = LaunchMatcher(forwards, self._all_fits)
        self._parts: dict[int, Parts] = {}
        self._run: dict[int, tuple[int, int]] = {}
        """(index, total) of the launch's run of its compiled graph in the forward, by correlation."""

    def placement(self, launch: Launch, name: str) -> Placement:
        """Return the placement of a router at its launch."""
        parts = self.parts_of(launch).get(name, {})
        work: dict[RangeKind, list[DeviceWork]] = {**parts, "graph": launch.work}
        spans = {kind: hull(item.span for item in items) for kind, items in work.items()}
        return Placement(
            host={"graph": launch.span},
            device={kind: span for kind, span in spans.items() if span is not None},
            busy_us={kind: round(sum(i.span.duration_us for i in items), 3) for kind, items in parts.items()},
        )

    def why_untimed(self, placement: Placement) -> str:
        """Return why a router has no time of its own."""
        captured = self.recording.captured_graphs
        problems = [graph.problem for graph in captured if graph.problem is not None]
        if problems:
            return problems[0]
        return UNKNOWN_NODES if captured and "graph" in placement.device else FUSED

    def know_forward(self, launches: Sequence[Launch]) -> None:
        """Number the launches of one forward in order; where layers share code, each belongs to one layer."""
        graphs = [None if (fit := self._fit(launch)) is None else fit.graph for launch in launches]
        runs, done = Counter(graphs), Counter[CompiledGraph | None]()
        for launch, graph in zip(launches, graphs, strict=True):
            self._run[launch.correlation] = (done[graph], runs[graph])
            done[graph] += 1

    def parts_of(self, launch: Launch) -> Parts:
        """Return each router's work; empty for an unknown graph."""
        if launch.correlation not in self._parts:
            self._parts[launch.correlation] = (
                _by_ids(launch, self.recording)
                or _by_positions(launch, self.recording.captured_graphs)
                or self._by_compiler(launch)
            )
        return self._parts[launch.correlation]

    def _by_compiler(self, launch: Launch) -> Parts:
        """Return the work if all kernels are known: a router without some of them would seem too fast."""
        found: Parts = defaultdict(lambda: defaultdict(list))
        fit = self._fit(launch)
        if fit is None:
            return found
        number, runs = self._run.get(launch.correlation, (0, 1))
        among = {router.name for router in self.recording.routers}
        for stretch, whole in self._matcher.launches(fit):
            for part in (fit.graph.parts[at] for at in whole.parts):
                router = part.router(number, runs, among)
                if router is not None and part.place != "block":
                    found[router][part.place] += [launch.work[i] for i in stretch.kernels]
        return found

    def _fit(self, launch: Launch) -> Fit | None:
        """Return the compiled graph that the launch replays; None if none or more than one fits."""
        fits = self._matcher.fits(launch.names)
        return fits[0] if len(launch.streams) == 1 == len(fits) and self._matcher.is_usual(fits[0]) else None

    def _all_fits(self) -> Iterator[Fit]:
        return (fit for launch in self.launches.graphs for fit in self._matcher.fits(launch.names))


def _by_ids(launch: Launch, recording: Recording) -> Parts:
    found: Parts = defaultdict(dict)
    names = {router.site: router.name for router in recording.routers}
    for label, ids in recording.annotated_nodes.items():
        match, id_set = RANGE_NAME.fullmatch(label), frozenset(ids)
        work = [item for item in launch.work if item.node_id and item.node_id in id_set]  # 0: unknown
        if work and match is not None and match.group(2) in names:
            kind: RangeKind = match.group(1)  # type: ignore[assignment]
            found[names[match.group(2)]][kind] = work
    return found


def _by_positions(launch: Launch, graphs: Sequence[CapturedGraph]) -> Parts:
    found: Parts = defaultdict(dict)
    events_by_calls = {
        (graph.calls, graph.copies): events for graph in graphs if (events := _events_of(launch, graph))
    }
    if (
        len(launch.streams) != 1 or len(events_by_calls) != 1
    ):  # no graph, or graphs that disagree on the calls
        return found
    (calls, _), events = next(iter(events_by_calls.items()))
    occurrences = Counter((call.name, call.kind) for call in calls)
    for call in calls:
        work = [event for event in events[call.first : call.last] if event is not None]
        if work and occurrences[call.name, call.kind] == 1:
            found[call.name][call.kind] = work
    return found


def _events_of(launch: Launch, graph: CapturedGraph) -> list[DeviceWork | None]:
    """Return the work of each node up to the last noted, None for a hidden copy; empty for another graph."""
    if graph.problem is not None:
        return []
    copies = frozenset(graph.copies)
    # A copy within the device runs as a kernel of the driver, `memcpy32_post`.
    each: list[DeviceWork | None] = [*launch.work[: graph.nodes]]
    kernels = iter([item for item in launch.work if item.kernel is not None])
    without_copies = [None if at in copies else next(kernels, None) for at in range(graph.nodes)]
    for events in (each, without_copies):
        shapes: list[Any]
        shapes = [event and event.kernel for at, event in enumerate(events) if at not in copies]
        if len(events) == graph.nodes and None not in shapes and graph_digest(shapes) == graph.digest:
            return events
    return []
