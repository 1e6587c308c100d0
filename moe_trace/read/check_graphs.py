"""Expectations of `check` for calls inside graphs."""

from __future__ import annotations

from collections.abc import Iterator

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import GRAPH_LAUNCH, RANGE_PREFIX, RangeKind, RoutingSample, Span, range_name
from moe_trace.data.trace_json.events import EventTable, Kind, to_ns
from moe_trace.timeline.correlate.compiled_calls import named
from moe_trace.timeline.counter_tracks import LANES
from moe_trace.timeline.placed_calls import REPLAY_NAME, PlacedCalls

SLACK_US = 0.002  # a microsecond with three decimals does not always survive conversion to float
_GRAPH_RANGE = f"{RANGE_PREFIX}graph/"


class HostPlaces:
    """Ranges, graph launches and operators on the host that calls can be placed at."""

    def __init__(self, events: EventTable) -> None:
        launches = (events.kind == Kind.LAUNCH) & named(events, GRAPH_LAUNCH)
        found = events.select((events.kind == Kind.RANGE) | launches)
        names = (events.names[i] for i in found.name.tolist())
        self._known = set(zip(names, found.start_ns.tolist(), found.duration_ns.tolist(), strict=True))
        """(name, start, duration) of ranges and graph launches, in nanoseconds."""
        self._graphs = {
            tuple(span) for name, *span in self._known if name.startswith((GRAPH_LAUNCH, _GRAPH_RANGE))
        }
        operators = events.select(events.kind == Kind.OP)
        self._starts, self._ends = set(operators.start_ns.tolist()), set(operators.end_ns.tolist())

    def hold(self, sample: RoutingSample, kind: RangeKind, span: Span) -> bool:
        """Return whether the trace has a range with the call's name or, for a call inside a graph, the graph
        or the time from the start of one operator to the end of another, which is all that code compiled for
        a CPU shows."""
        start_ns, duration_ns = to_ns([span.start_us, span.duration_us]).tolist()
        if (range_name(kind, sample.site), start_ns, duration_ns) in self._known:
            return True
        if kind == "graph":
            return (start_ns, duration_ns) in self._graphs
        return sample.in_graph and start_ns in self._starts and start_ns + duration_ns in self._ends


def expected_slices(calls: CallTable) -> Iterator[tuple[str, Span]]:
    """Return names and spans of the slices that the band must hold."""
    placed = PlacedCalls.of(calls)
    for kind in LANES:
        rows = placed.having(kind)
        spans = placed.spans[kind][rows].tolist()
        yield from ((site, Span(*span)) for site, span in zip(placed.calls.site[rows], spans, strict=True))
    yield from ((REPLAY_NAME, Span(*span)) for span in placed.replays.spans.tolist())


def odd_times(sample: RoutingSample) -> Iterator[str]:
    """Describe spans of routers and experts that lie outside their graph's time on the device or the host."""
    placement = sample.placement
    if placement is None or not placement.in_graph:
        return
    for side, spans in (("host", placement.host), ("device", placement.device)):
        for kind, span in spans.items():
            graph = spans.get("graph", span)
            if span.start_us < graph.start_us - SLACK_US or span.end_us > graph.end_us + SLACK_US:
                yield f"its {kind} lies outside its graph on the {side}"
    for kind, busy_us in placement.busy_us.items():
        if kind not in placement.host.keys() | placement.device.keys() or busy_us < 0:
            yield f"its {kind} is said to be busy for {busy_us} µs, but has no time in the trace"
