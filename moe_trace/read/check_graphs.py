"""What `check` expects of calls that were made inside graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import GRAPH_LAUNCH, RANGE_PREFIX, RoutingSample, Span
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.timeline.counter_tracks import LANES
from moe_trace.timeline.placed_calls import PlacedCalls
from moe_trace.timeline.replay_slices import REPLAY_NAME, find_replays

SLACK_US = 0.002  # a microsecond with three decimals does not always survive a float
_GRAPH_RANGE = f"{RANGE_PREFIX}graph/"

NamedSpan = tuple[str, int, int]
"""Name, start and duration in nanoseconds."""


def named_spans(events: EventTable) -> set[NamedSpan]:
    """Ranges, and launches of graphs."""
    is_launch = np.array([name == GRAPH_LAUNCH for name in events.names], dtype=bool)
    launches = np.zeros(len(events), dtype=bool)
    if len(events):
        launches = (events.kind == Kind.LAUNCH) & is_launch[events.name]
    found = events.select((events.kind == Kind.RANGE) | launches)
    names = (events.names[i] for i in found.name.tolist())
    return set(zip(names, found.start_ns.tolist(), found.duration_ns.tolist(), strict=True))


def graph_spans(known: set[NamedSpan]) -> set[tuple[int, int]]:
    """Where a graph may stand on the host: ranges round forwards, and launches."""
    return {
        (start_ns, duration_ns)
        for name, start_ns, duration_ns in known
        if name == GRAPH_LAUNCH or name.startswith(_GRAPH_RANGE)
    }


def expected_slices(samples: Sequence[RoutingSample]) -> Iterator[tuple[str, Span]]:
    """Names and spans of the slices that the band must hold."""
    placed = PlacedCalls.of(CallTable.of(samples))
    for kind in LANES:
        rows = placed.having(kind)
        spans = placed.spans[kind][rows].tolist()
        yield from ((site, Span(*span)) for site, span in zip(placed.calls.site[rows], spans, strict=True))
    yield from ((REPLAY_NAME, Span(*replay.span.tolist())) for replay in find_replays(placed))


def odd_times(sample: RoutingSample) -> Iterator[str]:
    """What is told of a router inside a graph must lie within the graph's time on the device."""
    placement = sample.placement
    if placement is None or not placement.in_graph:
        return
    device = placement.device
    for kind, span in device.items():
        graph = device.get("graph", span)
        if span.start_us < graph.start_us - SLACK_US or span.end_us > graph.end_us + SLACK_US:
            yield f"its {kind} lies outside its graph on the device"
    for kind, busy_us in placement.busy_us.items():
        if kind not in device or busy_us < 0:
            yield f"its {kind} is said to be busy for {busy_us} µs, but has no time on the device"
