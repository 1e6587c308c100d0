"""Which kernels of a graph's replay are a router's, and which its experts'.

By the ids of their nodes, where the graph was captured with annotations. Else by their positions: while the
graph was captured by hand, the hooks noted at which nodes each router and its experts began and ended. In a
plain chain the n-th event of a replay is the n-th node; the grids and blocks of all kernels up to the last
noted one must be those of the replay. Where the profiler shows no copies and memsets, the kernels alone are
told. Graphs of compiled code: by the compiler's provenance of what each of their kernels computes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.schema import (
    RANGE_NAME,
    CapturedGraph,
    RangeKind,
    Recording,
    Span,
    graph_digest,
)
from moe_trace.timeline.correlate.compiled_launches import (
    Stretch,
    is_consistent,
    lengths_of_calls,
    match_launches,
    part_of,
    split,
    usual_sequences,
)
from moe_trace.timeline.correlate.launches import DeviceWork, Launch, hull


@dataclass(frozen=True)
class NodeSpans:
    """The device time of one router, or of its experts, in one replay."""

    span: Span
    busy_us: float
    """Sum of its kernels, copies and memsets."""


class NodeFinder:
    """Finds routers and experts in the launches of graphs that one tracer knows."""

    def __init__(self, recording: Recording, launches: Sequence[Launch]) -> None:
        self._recording, self._launches = recording, launches
        self._found: dict[int, dict[str, dict[RangeKind, NodeSpans]]] = {}
        self._run: dict[int, tuple[int, int]] = {}
        """By launch: which run of its compiled graph in the forward it is, and how many there are."""

    def know_forward(self, launches: Sequence[Launch]) -> None:
        """All launches of one forward, in order: where layers share code, each is one layer's."""
        graphs = [None if (fit := self._fit(launch)) is None else fit[0] for launch in launches]
        runs, done = Counter(graphs), Counter[CompiledGraph | None]()
        for launch, graph in zip(launches, graphs, strict=True):
            self._run[launch.correlation] = (done[graph], runs[graph])
            done[graph] += 1

    def of(self, launch: Launch) -> dict[str, dict[RangeKind, NodeSpans]]:
        """By module path of the router; empty for a launch of a graph that is not known."""
        if launch.correlation not in self._found:
            self._found[launch.correlation] = (
                _by_ids(launch, self._recording)
                or _by_positions(launch, self._recording.captured_graphs)
                or self._by_compiler(launch)
            )
        return self._found[launch.correlation]

    def _by_compiler(self, launch: Launch) -> dict[str, dict[RangeKind, NodeSpans]]:
        """By the compiler's provenance."""
        fit = self._fit(launch)
        if fit is None:
            return {}
        graph, stretches = fit
        number, runs = self._run.get(launch.correlation, (0, 1))
        among = {router.name for router in self._recording.routers}
        work: dict[tuple[str, RangeKind], list[DeviceWork]] = defaultdict(list)
        names = [item.name for item in launch.work]
        parts = [split(names, stretch, graph, self._lengths) for stretch in stretches]
        for stretch in chain.from_iterable(parts):
            whole = part_of(stretch, graph)
            if whole is None:
                return {}  # a router without some of its kernels would be too quick
            for part in (graph.parts[at] for at in whole.parts):
                router = part.router(number, runs, among)
                if router is not None and part.place != "block":
                    work[router, part.place].extend(launch.work[i] for i in stretch.kernels)
        found: dict[str, dict[RangeKind, NodeSpans]] = defaultdict(dict)
        for (name, kind), items in work.items():
            found[name][kind] = _spans_of(items)
        return dict(found)

    def _fit(self, launch: Launch) -> tuple[CompiledGraph, list[Stretch]] | None:
        """The compiled graph that it replays; None where none fits, or several."""
        names = tuple(item.name for item in launch.work)
        fitting = _fitting(names, self._recording.compiled_graphs)
        known = len(launch.streams) == 1 == len(fitting) and self._usual[fitting[0][0]] == names
        return fitting[0] if known else None

    @cached_property
    def _usual(self) -> dict[CompiledGraph, tuple[str, ...] | None]:
        """The kernels that each compiled graph runs."""
        return usual_sequences((graph, names) for names, graph, _ in self._every)

    @cached_property
    def _lengths(self) -> dict[str, set[int]]:
        """How many kernels a library's call runs, by operator, where the replays tell."""
        return lengths_of_calls(self._every)

    @cached_property
    def _every(self) -> list[tuple[tuple[str, ...], CompiledGraph, list[Stretch]]]:
        """Names of each launch's kernels, and the compiled graphs that they fit."""
        every = [tuple(item.name for item in launch.work) for launch in self._launches]
        graphs = self._recording.compiled_graphs
        return [(names, *fit) for names in every for fit in _fitting(names, graphs)]


def _fitting(
    names: Sequence[str], graphs: Sequence[CompiledGraph]
) -> list[tuple[CompiledGraph, list[Stretch]]]:
    """The compiled graphs whose launches these kernels can be."""
    found = [(graph, match_launches(names, graph)) for graph in graphs if not graph.backward]
    return [(g, match) for g, match in found if match is not None and is_consistent(names, match, g)]


def _by_ids(launch: Launch, recording: Recording) -> dict[str, dict[RangeKind, NodeSpans]]:
    if not recording.annotated_nodes or not any(item.node_id for item in launch.work):
        return {}
    names = {router.site: router.name for router in recording.routers}
    found: dict[str, dict[RangeKind, NodeSpans]] = defaultdict(dict)
    for label, ids in recording.annotated_nodes.items():
        match, wanted = RANGE_NAME.fullmatch(label), frozenset(ids)
        work = [item for item in launch.work if item.node_id in wanted]
        if work and match is not None and match.group(2) in names:
            kind: RangeKind = match.group(1)  # type: ignore[assignment]
            found[names[match.group(2)]][kind] = _spans_of(work)
    return dict(found)


def _by_positions(launch: Launch, graphs: Sequence[CapturedGraph]) -> dict[str, dict[RangeKind, NodeSpans]]:
    if len(launch.streams) != 1:
        return {}
    alike = {(graph.calls, graph.copies): events for graph in graphs if (events := _events_of(launch, graph))}
    if len(alike) != 1:  # none, or several that do not agree on where the calls are
        return {}
    (calls, _), events = next(iter(alike.items()))
    often = Counter((call.name, call.kind) for call in calls)
    found: dict[str, dict[RangeKind, NodeSpans]] = defaultdict(dict)
    for call in calls:
        work = [event for event in events[call.first : call.last] if event is not None]
        if work and often[call.name, call.kind] == 1:
            found[call.name][call.kind] = _spans_of(work)
    return dict(found)


def _events_of(launch: Launch, graph: CapturedGraph) -> list[DeviceWork | None]:
    """By node, up to the last noted: what ran, None for a copy that is not shown; empty for another graph."""
    if graph.problem is not None:
        return []
    copies = frozenset(graph.copies)
    # A copy between two places of the device runs as a kernel of the driver's own, `memcpy32_post`.
    each: list[DeviceWork | None] = [*launch.work[: graph.nodes]]
    kernels = iter([item for item in launch.work if item.kernel is not None])
    without_copies = [None if at in copies else next(kernels, None) for at in range(graph.nodes)]
    for events in (each, without_copies):
        shapes = [_shape(event) for at, event in enumerate(events) if at not in copies]
        if len(events) == graph.nodes and None not in shapes and graph_digest(shapes) == graph.digest:
            return events
    return []


def _shape(event: DeviceWork | None) -> Any:
    return None if event is None else event.kernel


def _spans_of(work: Sequence[DeviceWork]) -> NodeSpans:
    span = hull(item.span for item in work)
    assert span is not None
    return NodeSpans(span, round(sum(item.span.duration_us for item in work), 3))
