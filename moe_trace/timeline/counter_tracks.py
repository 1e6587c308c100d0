"""The compact band: counter tracks and lanes of one synthetic process above the CPU and GPU rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from moe_trace.data.calls.placements import Floats, IntArray
from moe_trace.data.codec import number_cells
from moe_trace.data.schema import BAND_NAME, BAND_PID, BAND_SORT_INDEX, RangeKind
from moe_trace.timeline.placed_calls import FIGURES, PlacedCalls
from moe_trace.timeline.replay_slices import REPLAY_FIGURES, REPLAY_NAME, find_replays, replay_args, spans_of

Tracks = Sequence[Literal["band", "layers", "experts"]]

LANES: tuple[RangeKind, ...] = ("router", "experts")
OF_ROUTER = (
    *("router", "step", "call", "phase", "stage", "clock", "tokens", "top_k"),
    *("router entropy (nats)", "router confidence", "router FLOPs", "in graph"),
)
"""What a router's slice shows beside one of its experts."""
_json = msgspec.json.encode


def band_events(placed: PlacedCalls, *, rank: int, tracks: Tracks = ("band",)) -> Iterator[bytes]:
    """Chrome trace events for the calls, as JSON, one by one.

    Thousands of small objects that live at once would set off the garbage collector, which walks the user's
    model too.

    Args:
        rank: names the band's process and is added to its id.
        tracks: `band`: one counter track a figure, for all layers; `layers`: a track per layer and
            figure; `experts`: one stacked track of the assignments to all experts.
    """
    if not len(placed):
        return
    pid = BAND_PID + rank
    yield from _process_events(pid, rank, placed.start_us)
    for track in tracks:
        yield from _TRACKS[track](placed, pid)
    yield from _replay_counters(placed, pid)
    lanes = [*_call_lanes(placed), *_replay_lanes(placed)]
    for tid, (name, span, titles, args) in enumerate(lanes, start=1):
        yield from _lane_names(name, span[0, 0], pid, tid)
        text = b'{"ph":"X","cat":"moe_trace","name":%%b,"pid":%d,"tid":%d,"ts":%%b,"dur":%%b,"args":%%b}'
        yield from map(
            (text % (pid, tid)).__mod__, zip(titles, *map(number_cells, span.T), args, strict=True)
        )


def _process_events(pid: int, rank: int, start_us: float) -> Iterator[bytes]:
    yield _metadata("process_name", {"name": BAND_NAME}, start_us, pid)
    yield _metadata("process_sort_index", {"sort_index": BAND_SORT_INDEX + rank}, start_us, pid)


def _metadata(name: str, args: dict[str, Any], start_us: float, pid: int, tid: int = 0) -> bytes:
    return _json({"ph": "M", "name": name, "ts": float(start_us), "pid": pid, "tid": tid, "args": args})


def band_label(rank: int, start_us: float) -> dict[str, Any]:
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


def _band_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    yield from _figure_counters(placed, placed.of_layers, pid)


def _layer_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    site = placed.calls.site[placed.of_layers]
    for one in sorted(set(site.tolist())):
        yield from _figure_counters(placed, placed.of_layers[site == one], pid, prefix=f"{one} ")


def _figure_counters(placed: PlacedCalls, rows: IntArray, pid: int, *, prefix: str = "") -> Iterator[bytes]:
    for lane, members in enumerate(without_overlap(placed.moe, rows)):
        for name, figure in FIGURES.items():
            values = figure(placed)[members]
            told = values == values
            counts = [b'{"value":%b}' % cell for cell in number_cells(values[told])]
            title = numbered(f"{prefix}{name}", lane)
            yield from _step_function(title, placed.moe[members[told]], counts, b'{"value":0}', pid)


def _expert_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    for lane, members in enumerate(without_overlap(placed.moe, placed.of_layers)):
        loads = placed.calls.assignments.take(members).to_lists()
        series = [{f"E{i:02d}": count for i, count in enumerate(load or ())} for load in loads]
        title = numbered("assignments by expert", lane)
        for row, counts in zip(members.tolist(), series, strict=True):
            none = _json(dict.fromkeys(counts, 0))
            yield from _step_function(title, placed.moe[row : row + 1], [_json(counts)], none, pid)


def _replay_counters(placed: PlacedCalls, pid: int) -> Iterator[bytes]:
    replays = find_replays(placed)
    spans = spans_of(replays)
    for lane, members in enumerate(without_overlap(spans)):
        for name, figure in REPLAY_FIGURES.items():
            values = [figure(replays[i]) for i in members.tolist()]
            told = np.array([value is not None for value in values], bool)
            counts = [_json({"value": value}) for value in values if value is not None]
            yield from _step_function(numbered(name, lane), spans[members[told]], counts, b'{"value":0}', pid)


_TRACKS: dict[str, Callable[[PlacedCalls, int], Iterator[bytes]]] = {
    "band": _band_counters,
    "layers": _layer_counters,
    "experts": _expert_counters,
}


def _step_function(
    name: str, spans: Floats, values: Sequence[bytes], zero: bytes, pid: int
) -> Iterator[bytes]:
    """A value from the start of its MoE layer, 0 from its end."""
    head = b'{"ph":"C","name":%b,"pid":%d,"tid":0,"ts":' % (_json(name), pid)
    for start, end, value in zip(number_cells(spans[:, 0]), number_cells(spans.sum(1)), values, strict=True):
        yield b'%b%b,"args":%b}' % (head, start, value)
        yield b'%b%b,"args":%b}' % (head, end, zero)


# -- lanes --------------------------------------------------------------------------------------------

_Lane = tuple[str, Floats, Iterable[bytes], Iterable[bytes]]
"""Its name, where its slices stand, and the names and arguments of these."""


def _call_lanes(placed: PlacedCalls) -> Iterator[_Lane]:
    if not len(placed.of_layers):
        return
    sites = np.array([_json(key.site) for key in placed.calls.keys], object)[placed.calls.router]
    whole, short = [], []
    for args in placed.slice_args():
        whole.append(_json(args))
        short.append(_json({name: args[name] for name in OF_ROUTER if name in args}))
    # What is told of the experts stands in their slice, and in the router's where they have none.
    alone = np.isnan(placed.spans["experts"][:, 0])
    router = np.where(alone, np.array(whole, object), np.array(short, object))
    args_of = {"router": router, "experts": np.array(whole, object)}
    for kind in LANES:
        span = placed.spans[kind]
        rows = placed.of_layers[~np.isnan(span[placed.of_layers, 0])]
        for lane, members in enumerate(without_overlap(span, rows)):
            yield numbered(kind, lane), span[members], sites[members], args_of[kind][members]


def _replay_lanes(placed: PlacedCalls) -> Iterator[_Lane]:
    replays = find_replays(placed)
    spans = spans_of(replays)
    for lane, members in enumerate(without_overlap(spans)):
        args = (_json(replay_args(replays[i])) for i in members.tolist())
        yield numbered(REPLAY_NAME, lane), spans[members], [_json(REPLAY_NAME)] * len(members), args


def _lane_names(name: str, start_us: float, pid: int, tid: int) -> Iterator[bytes]:
    yield _metadata("thread_name", {"name": name}, start_us, pid, tid)
    yield _metadata("thread_sort_index", {"sort_index": tid}, start_us, pid, tid)


def numbered(name: str, lane: int) -> str:
    """Names of the further lanes that overlapping spans need."""
    return name if lane == 0 else f"{name} ({lane + 1})"


def without_overlap(spans: Floats, rows: IntArray | None = None) -> list[IntArray]:
    """Rows of `[N, 2]` starts and durations, in as few lanes as hold none that overlap.

    Args:
        rows: which of them; None for all.
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
