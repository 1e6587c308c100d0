"""Counter tracks and lanes of one synthetic process, the band, above the CPU and GPU rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.placements import Floats, IntArray
from moe_trace.data.codec import number_cells
from moe_trace.data.schema import BAND_NAME, BAND_PID, BAND_SORT_INDEX, RangeKind
from moe_trace.timeline.placed_calls import FIGURES, REPLAY_FIGURES, REPLAY_NAME, PlacedCalls, Replays

Tracks = Sequence[Literal["band", "layers", "experts"]]

LANES: tuple[RangeKind, ...] = ("router", "experts")
OF_ROUTER = (
    *("router", "step", "call", "phase", "stage", "clock", "tokens", "top_k"),
    *("router entropy (nats)", "router confidence", "router FLOPs", "in graph"),
)
"""Arguments of a router's slice where the experts' slice has all of them."""
_json = msgspec.json.encode


def band_events(placed: PlacedCalls, *, rank: int, tracks: Tracks = ("band",)) -> Iterator[bytes]:
    """Yield Chrome trace events for the calls, as JSON.

    Thousands of event objects alive at once would trigger the garbage collector, which also traverses the
    user's model.

    Args:
        rank: names the band's process and is added to its id.
        tracks: `band`: one counter track per metric, for all layers; `layers`: one per layer and metric;
            `experts`: one stacked track of the assignments to all experts.
    """
    if not len(placed):
        return
    pid = BAND_PID + rank
    yield _metadata("process_name", {"name": BAND_NAME}, placed.start_us, pid)
    yield _metadata("process_sort_index", {"sort_index": BAND_SORT_INDEX + rank}, placed.start_us, pid)
    for track in tracks:
        yield from _TRACKS[track](placed, pid)
    replays = placed.replays
    yield from _replay_counters(replays, pid)
    lanes = [*_call_lanes(placed), *_replay_lanes(replays)]
    for tid, (name, span, titles, args) in enumerate(lanes, start=1):
        yield _metadata("thread_name", {"name": name}, span[0, 0], pid, tid)
        yield _metadata("thread_sort_index", {"sort_index": tid}, span[0, 0], pid, tid)
        text = b'{"ph":"X","cat":"moe_trace","name":%%b,"pid":%d,"tid":%d,"ts":%%b,"dur":%%b,"args":%%b}'
        yield from map(
            (text % (pid, tid)).__mod__, zip(titles, *map(number_cells, span.T), args, strict=True)
        )


def _metadata(name: str, args: dict[str, Any], start_us: float, pid: int, tid: int = 0) -> bytes:
    return _json({"ph": "M", "name": name, "ts": float(start_us), "pid": pid, "tid": tid, "args": args})


def band_label(rank: int, start_us: float) -> dict[str, Any]:
    """Return the event that names the band's rank and contains the recording."""
    return {
        "ph": "M",
        "name": "process_labels",
        "ts": start_us,
        "pid": BAND_PID + rank,
        "tid": 0,
        "args": {"labels": f"rank {rank}"},
    }


# -- counters -----------------------------------------------------------------------------------------


def _band_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    yield from _figure_counters(placed, placed.of_layers, pid)


def _layer_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    site = placed.calls.site[placed.of_layers]
    for name in sorted(set(site.tolist())):
        yield from _figure_counters(placed, placed.of_layers[site == name], pid, prefix=f"{name} ")


def _figure_counters(placed: PlacedCalls, rows: IntArray, pid: int, *, prefix: str = "") -> Iterator[bytes]:
    values = {f"{prefix}{name}": figure(placed) for name, figure in FIGURES.items()}
    yield from _counters(placed.moe, rows, values, pid)


def _replay_counters(replays: Replays, pid: int) -> Iterator[bytes]:
    values = {name: figure(replays) for name, figure in REPLAY_FIGURES.items()}
    yield from _counters(replays.spans, np.arange(len(replays.spans)), values, pid)


def _counters(spans: Floats, rows: IntArray, figures: dict[str, npt.NDArray], pid: int) -> Iterator[bytes]:
    for lane, members in enumerate(without_overlap(spans, rows)):
        for name, values in figures.items():
            known = members[~np.isnan(values[members])]
            counts = [b'{"value":%b}' % cell for cell in number_cells(values[known])]
            yield from _step_function(numbered(name, lane), spans[known], counts, b'{"value":0}', pid)


def _expert_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    for lane, members in enumerate(without_overlap(placed.moe, placed.of_layers)):
        loads = placed.calls.assignments.take(members).to_lists()
        title = numbered("assignments by expert", lane)
        for row, load in zip(members.tolist(), loads, strict=True):
            counts = {f"E{i:02d}": count for i, count in enumerate(load or ())}
            none = _json(dict.fromkeys(counts, 0))
            yield from _step_function(title, placed.moe[row : row + 1], [_json(counts)], none, pid)


_TRACKS: dict[str, Callable[[PlacedCalls, int], Iterator[bytes]]] = {
    "band": _band_counters,
    "layers": _layer_counters,
    "experts": _expert_counters,
}


def _step_function(
    name: str, spans: Floats, values: Sequence[bytes], zero: bytes, pid: int
) -> Iterator[bytes]:
    """Yield counter events: the value at the start of its MoE layer, 0 at its end."""
    head = b'{"ph":"C","name":%b,"pid":%d,"tid":0,"ts":' % (_json(name), pid)
    for start, end, value in zip(number_cells(spans[:, 0]), number_cells(spans.sum(1)), values, strict=True):
        yield b'%b%b,"args":%b}' % (head, start, value)
        yield b'%b%b,"args":%b}' % (head, end, zero)


# -- lanes --------------------------------------------------------------------------------------------

_Lane = tuple[str, Floats, Iterable[bytes], Iterable[bytes]]
"""Name, spans, slice names and slice arguments of a lane."""


def _call_lanes(placed: PlacedCalls) -> Iterator[_Lane]:
    if not len(placed.of_layers):
        return
    sites = np.array([_json(key.site) for key in placed.calls.keys], object)[placed.calls.router]
    call_args, router_args = [], []
    for args in placed.slice_args():
        call_args.append(_json(args))
        router_args.append(_json({name: args[name] for name in OF_ROUTER if name in args}))
    # Details of the experts are in their slice, or in the router's if they have none.
    alone = np.isnan(placed.spans["experts"][:, 0])
    router = np.where(alone, np.array(call_args, object), np.array(router_args, object))
    args_of = {"router": router, "experts": np.array(call_args, object)}
    for kind in LANES:
        span = placed.spans[kind]
        rows = placed.of_layers[~np.isnan(span[placed.of_layers, 0])]
        for lane, members in enumerate(without_overlap(span, rows)):
            yield numbered(kind, lane), span[members], sites[members], args_of[kind][members]


def _replay_lanes(replays: Replays) -> Iterator[_Lane]:
    args = np.array([_json(args) for args in replays.slice_args()], object)
    for lane, members in enumerate(without_overlap(replays.spans)):
        name = [_json(REPLAY_NAME)] * len(members)
        yield numbered(REPLAY_NAME, lane), replays.spans[members], name, args[members]


def numbered(name: str, lane: int) -> str:
    """Return the name of a lane; overlapping spans need further, numbered lanes."""
    return name if lane == 0 else f"{name} ({lane + 1})"


def without_overlap(spans: Floats, rows: IntArray | None = None) -> list[IntArray]:
    """Distribute `[N, 2]` starts and durations over as few lanes as possible without overlap.

    Args:
        rows: rows to distribute; None for all.
    """
    rows = np.arange(len(spans)) if rows is None else rows
    rows = rows[np.argsort(spans[rows, 0], kind="stable")]
    starts, ends = spans[rows, 0], spans[rows].sum(1)
    if len(rows) and (ends[:-1] <= starts[1:]).all():
        return [rows]
    lanes: list[list[int]] = []
    last: list[float] = []
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        lane = next((i for i, until in enumerate(last) if until <= start), len(last))
        if lane == len(last):
            lanes.append([])
            last.append(0.0)
        lanes[lane].append(row)
        last[lane] = end
    return [np.array(lane, np.int64) for lane in lanes]
