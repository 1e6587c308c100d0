"""The compact band: counter tracks and lanes of one synthetic process above the CPU and GPU rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from moe_trace.data.schema import BAND_NAME, BAND_PID, BAND_SORT_INDEX, RangeKind, RoutingSample, Span
from moe_trace.timeline.replay_slices import (
    REPLAY_FIGURES,
    REPLAY_NAME,
    PlacedCall,
    Replay,
    find_replays,
    placed_call,
    replay_args,
)

Tracks = Sequence[Literal["band", "layers", "experts"]]
Event = dict[str, Any]
_T = TypeVar("_T")

BUSIEST = 4
"""Experts that a slice names."""

LANES: tuple[RangeKind, ...] = ("router", "experts")


def band_events(
    samples: Iterable[RoutingSample],
    *,
    rank: int,
    tracks: Tracks = ("band",),
    experts_are_split: bool = False,
) -> Iterator[Event]:
    """Chrome trace events for the samples that were placed, one by one.

    Thousands of small objects that live at once would set off the garbage collector, which walks the user's
    model too.

    Args:
        rank: names the band's process and is added to its id.
        tracks: `band`: one counter track a figure, for all layers; `layers`: a track per layer and
            figure; `experts`: one stacked track of the assignments to all experts.
        experts_are_split: see `Recording.experts_are_split`; their FLOP/s are left out then.
    """
    placed = (sample for sample in samples if sample.placement is not None)
    calls = sorted(
        (placed_call(sample, experts_are_split=experts_are_split) for sample in placed),
        key=lambda c: c.moe.start_us,
    )
    if not calls:
        return
    pid = BAND_PID + rank
    yield from _process_events(pid, rank, calls[0].moe.start_us)
    layers, replays = [call for call in calls if call.of_layer], find_replays(calls)
    for track in tracks:
        yield from _TRACKS[track](layers, pid)
    yield from _replay_counters(replays, pid)
    tid = 0
    for event in _lane_events(layers, pid):
        tid = event["tid"]
        yield event
    yield from _replay_lanes(replays, pid, first_tid=tid + 1)


def _process_events(pid: int, rank: int, start_us: float) -> list[Event]:
    values = (
        ("process_name", {"name": BAND_NAME}),
        ("process_sort_index", {"sort_index": BAND_SORT_INDEX + rank}),
    )
    return [
        {"ph": "M", "name": name, "ts": start_us, "pid": pid, "tid": 0, "args": args} for name, args in values
    ]


def band_label(rank: int, start_us: float) -> Event:
    """The event that names the band's rank, and that carries the recording."""
    return {
        "ph": "M",
        "name": "process_labels",
        "ts": start_us,
        "pid": BAND_PID + rank,
        "tid": 0,
        "args": {"labels": f"rank {rank}"},
    }


# -- counters -----------------------------------------------------------------------------------------


def _expert_tflops(call: PlacedCall) -> float | None:
    experts = call.spans.get("experts")
    if experts is None or experts.duration_us <= 0 or not call.sample.expert_flops or call.experts_are_split:
        return None
    return call.sample.expert_flops / experts.duration_us / 1e6


def _skipped_share(call: PlacedCall) -> float | None:
    slots = call.sample.tokens * call.sample.top_k
    return 100 * call.sample.skipped / slots if call.sample.skipped else None


FIGURES: dict[str, Callable[[PlacedCall], float | None]] = {
    "load max÷mean": lambda call: call.load.max_over_mean,
    "router entropy (nats)": lambda call: call.sample.router_entropy,
    "active experts": lambda call: call.load.active_experts,
    "expert TFLOP/s (with gaps)": _expert_tflops,
    "skipped slots (%)": _skipped_share,
}


def _band_counters(calls: Sequence[PlacedCall], pid: int) -> Iterator[Event]:
    """A step function over time: a layer's value from the start of its MoE layer, 0 from its end."""
    for lane, members in enumerate(without_overlap(calls, lambda call: call.moe)):
        for name, figure in FIGURES.items():
            yield from _step_function(numbered(name, lane), "value", figure, members, pid)


def _layer_counters(calls: Sequence[PlacedCall], pid: int) -> Iterator[Event]:
    for site in sorted({call.sample.site for call in calls}):
        of_site = [call for call in calls if call.sample.site == site]
        for lane, members in enumerate(without_overlap(of_site, lambda call: call.moe)):
            for name, figure in FIGURES.items():
                yield from _step_function(numbered(f"{site} {name}", lane), "value", figure, members, pid)


def _expert_counters(calls: Sequence[PlacedCall], pid: int) -> Iterator[Event]:
    for lane, members in enumerate(without_overlap(calls, lambda call: call.moe)):
        name = numbered("assignments by expert", lane)
        for call in members:
            counts = {f"E{i:02d}": int(n) for i, n in enumerate(call.sample.assignments)}
            yield _counter(name, pid, call.moe.start_us, counts)
            yield _counter(name, pid, call.moe.end_us, dict.fromkeys(counts, 0))


def _replay_counters(replays: Sequence[Replay], pid: int) -> Iterator[Event]:
    for lane, members in enumerate(without_overlap(replays, lambda replay: replay.span)):
        for name, figure in REPLAY_FIGURES.items():
            for replay in members:
                value = figure(replay)
                if value is not None:
                    yield _counter(numbered(name, lane), pid, replay.span.start_us, {"value": value})
                    yield _counter(numbered(name, lane), pid, replay.span.end_us, {"value": 0})


_TRACKS: dict[str, Callable[[Sequence[PlacedCall], int], Iterator[Event]]] = {
    "band": _band_counters,
    "layers": _layer_counters,
    "experts": _expert_counters,
}


def _step_function(
    name: str,
    series: str,
    figure: Callable[[PlacedCall], float | None],
    calls: Sequence[PlacedCall],
    pid: int,
) -> Iterator[Event]:
    for call in calls:
        value = figure(call)
        if value is not None:
            yield _counter(name, pid, call.moe.start_us, {series: value})
            yield _counter(name, pid, call.moe.end_us, {series: 0})


def _counter(name: str, pid: int, time_us: float, values: Mapping[str, float]) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": time_us, "args": values}


# -- lanes --------------------------------------------------------------------------------------------


def _lane_events(calls: Sequence[PlacedCall], pid: int) -> Iterator[Event]:
    lanes = [(kind, lane, members) for kind in LANES for lane, members in enumerate(_lanes_of(calls, kind))]
    args = {id(call): slice_args(call) for call in calls}  # of its slice in each lane
    for tid, (kind, lane, members) in enumerate(lanes, start=1):
        yield from _lane_names(numbered(kind, lane), members[0].spans[kind].start_us, pid, tid)
        for call in members:
            yield _slice(call.sample.site, call.spans[kind], args[id(call)], pid, tid)


def _replay_lanes(replays: Sequence[Replay], pid: int, *, first_tid: int) -> Iterator[Event]:
    lanes = without_overlap(replays, lambda replay: replay.span)
    for lane, members in enumerate(lanes):
        tid = first_tid + lane
        yield from _lane_names(numbered(REPLAY_NAME, lane), members[0].span.start_us, pid, tid)
        for replay in members:
            yield _slice(REPLAY_NAME, replay.span, replay_args(replay), pid, tid)


def _lane_names(name: str, start_us: float, pid: int, tid: int) -> Iterator[Event]:
    for key, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": tid})):
        yield {"ph": "M", "name": key, "ts": start_us, "pid": pid, "tid": tid, "args": args}


def _lanes_of(calls: Sequence[PlacedCall], kind: RangeKind) -> list[list[PlacedCall]]:
    with_span = [call for call in calls if kind in call.spans]
    return without_overlap(with_span, lambda call: call.spans[kind])


def _slice(name: str, span: Span, args: dict[str, Any], pid: int, tid: int) -> Event:
    return {
        "ph": "X",
        "cat": "moe_trace",
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": span.start_us,
        "dur": span.duration_us,
        "args": args,
    }


def slice_args(call: PlacedCall) -> dict[str, Any]:
    """What a click on a slice shows."""
    sample, load = call.sample, call.load
    return {
        "router": sample.name,
        "step": sample.step,
        "call": sample.call,
        "phase": sample.phase,
        "stage": sample.stage,
        "clock": call.clock,
        "tokens": sample.tokens,
        "top_k": sample.top_k,
        "assignments": int(sample.assignments.sum()),
        "busiest experts": _busiest(sample.assignments),
        "skipped": sample.skipped,
        "padding_assignments": sample.padding_assignments,
        "load max÷mean": load.max_over_mean,
        "load CV": load.cv,
        "load Gini": load.gini,
        "load entropy": load.entropy,
        "active experts": load.active_experts,
        "router entropy (nats)": sample.router_entropy,
        "router confidence": sample.confidence,
        "router FLOPs": sample.router_flops,
        "expert FLOPs": sample.expert_flops,
        **({"in graph": True} if sample.in_graph else {}),
    }


def _busiest(assignments: np.ndarray) -> dict[str, int]:
    """The first few by load, however many experts there are: all of them stand in the recording."""
    order = np.argsort(-assignments, kind="stable")[:BUSIEST]
    return {f"E{expert}": int(assignments[expert]) for expert in order if assignments[expert]}


def numbered(name: str, lane: int) -> str:
    """Names of the further lanes that overlapping spans need."""
    return name if lane == 0 else f"{name} ({lane + 1})"


def without_overlap(items: Sequence[_T], span_of: Callable[[_T], Span]) -> list[list[_T]]:
    """The items in as few lanes as possible, none of which holds two spans that overlap."""
    lanes: list[list[_T]] = []
    ends: list[float] = []
    for item in sorted(items, key=lambda i: span_of(i).start_us):
        span = span_of(item)
        lane = next((i for i, end in enumerate(ends) if end <= span.start_us), None)
        if lane is None:
            lanes.append([])
            ends.append(0.0)
            lane = len(lanes) - 1
        lanes[lane].append(item)
        ends[lane] = span.end_us
    return lanes
