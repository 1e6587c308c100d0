"""The calls drawn in the band as columns: their places and metrics. N calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.placements import Floats, IntArray, Side
from moe_trace.data.calls.table import CallTable, Mask, known_values
from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.load_stats import Loads, describe_loads
from moe_trace.data.schema import RANGE_KINDS, RangeKind

BUSIEST = 4
"""Number of experts listed in a slice."""


@dataclass(frozen=True, eq=False)
class PlacedCalls:
    """Calls with a place, in order of time."""

    calls: CallTable
    spans: Mapping[RangeKind, Floats]
    """[N, 2] start and duration; on the device if the call has a place there, else on the host."""
    on_device: Mask
    experts_are_split: bool = False
    """See `Recording.experts_are_split`."""
    by_compiler: bool = False
    """Whether routers and experts inside graphs are identified by the compiler's provenance."""

    @staticmethod
    def of(calls: CallTable, *, experts_are_split: bool = False, by_compiler: bool = False) -> PlacedCalls:
        """Return the calls of a table that have a placement."""
        calls = calls.take(calls.places.placed)
        placed = PlacedCalls.on(_is_on_device(calls), calls, experts_are_split=experts_are_split)
        return replace(placed, by_compiler=by_compiler)

    @staticmethod
    def on(on_device: Mask, calls: CallTable, *, experts_are_split: bool = False) -> PlacedCalls:
        """Return calls on the given clock."""
        sides: tuple[Side, Side] = ("device", "host")
        spans = {
            kind: np.where(on_device[:, None], *(calls.places.span(side, kind) for side in sides))
            for kind in RANGE_KINDS
        }
        order = np.argsort(_layer_spans(spans)[:, 0], kind="stable")
        spans = {kind: span[order] for kind, span in spans.items()}
        return PlacedCalls(calls.take(order), spans, on_device[order], experts_are_split)

    def __len__(self) -> int:
        return len(self.calls)

    @cached_property
    def moe(self) -> Floats:
        """[N, 2] span of the MoE layer: its block, or its router and experts together, or else its graph."""
        return _layer_spans(self.spans)

    @cached_property
    def loads(self) -> Loads:
        """Load statistics of each call."""
        return describe_loads(self.calls.assignments)

    @cached_property
    def totals(self) -> IntArray:
        """[N] number of assignments."""
        return self.calls.assignments.totals()

    def having(self, kind: RangeKind) -> IntArray:
        """Return the rows that have a range of that kind."""
        return np.flatnonzero(_is_known(self.spans[kind]))

    @cached_property
    def of_layers(self) -> IntArray:
        """Rows with a place of their own, not only one shared with the other layers of their graph."""
        return np.flatnonzero(_is_known(self.spans["router"]) | _is_known(self.spans["block"]))

    @property
    def start_us(self) -> float:
        """Start of the first call; there must be one."""
        return float(self.moe[0, 0])

    @property
    def clock(self) -> npt.NDArray[np.str_]:
        """[N] clock of each call's spans, `device` or `host`."""
        return np.where(self.on_device, "device", "host")

    @property
    def replays(self) -> Replays:
        """Calls that share a graph or forward, in order of time; computed anew each time."""
        rows = self.having("graph")
        calls, graph_spans = self.calls.take(rows), self.spans["graph"][rows]
        launched = np.nan_to_num(calls.places.span("host", "graph"))
        keys, replay = np.unique(
            np.column_stack([graph_spans, calls.thread, launched]), axis=0, return_inverse=True
        )
        replay = replay.reshape(-1)
        order = np.lexsort((calls.layer, replay))
        return Replays(self, rows[order], replay[order], keys[:, :2])

    def slice_args(self) -> Iterator[dict[str, Any]]:
        """Yield each slice's arguments, shown on a click."""
        calls, loads = self.calls, self.loads
        columns: dict[str, Iterable[Any]] = {
            "router": [calls.keys[router].name for router in calls.router.tolist()],
            **{name: calls.values(name) for name in ("step", "call", "phase", "stage")},
            "clock": self.clock.tolist(),
            **{name: calls.values(name) for name in ("tokens", "top_k")},
            "assignments": self.totals.tolist(),
            "busiest experts": self._busiest(),
            **{name: calls.values(name) for name in ("skipped", "padding_assignments")},
            "load max÷mean": known_values(loads.max_over_mean),
            "load CV": known_values(loads.cv),
            "load Gini": known_values(loads.gini),
            "load entropy": known_values(loads.entropy),
            "active experts": loads.active_experts.tolist(),
            "router entropy (nats)": calls.values("router_entropy"),
            "router confidence": calls.values("confidence"),
            "router FLOPs": calls.values("router_flops"),
            "expert FLOPs": calls.values("expert_flops"),
        }
        graph = {"in graph": True} | ({"router and experts": BY_COMPILER} if self.by_compiler else {})
        rows = zip(zip(*columns.values(), strict=True), calls.in_graph.tolist(), strict=True)
        for row, in_graph in rows:
            yield dict(zip(columns, row, strict=True)) | (graph if in_graph else {})

    def line(self, row: int) -> str:
        """Describe one call in a line."""
        worst, entropy = self.loads.max_over_mean[row], self.calls.router_entropy[row]
        parts = [f"{self.calls.tokens[row]} tokens", f"{self.totals[row]} assignments"]
        if worst == worst:
            parts.append(f"load max÷mean {worst:.2f}")
        parts.append(f"{self.loads.active_experts[row]} active experts")
        if entropy == entropy:
            parts.append(f"entropy {entropy:.3f} nats")
        return ", ".join(parts)

    def _busiest(self) -> Iterator[dict[str, int]]:
        """Yield the `BUSIEST` experts by load; the recording has all of them."""
        for loads_E in self.calls.assignments.rows():
            assert loads_E is not None
            order = np.argsort(-loads_E, kind="stable")[:BUSIEST]
            pairs = zip(order.tolist(), loads_E[order].tolist(), strict=True)
            yield {f"E{expert}": load for expert, load in pairs if load}


@dataclass(frozen=True, eq=False)
class Replays:
    """Calls that share one place: all layers of a compiled forward, or of one replay of a graph. R replays of
    M calls."""

    placed: PlacedCalls
    row: IntArray
    """[M] row of each call in `placed`, by replay and layer."""
    replay: IntArray
    """[M] index of its replay."""
    spans: Floats
    """[R, 2] start and duration."""

    def worst(self, values: npt.NDArray) -> Floats:
        """Return the largest value of each replay's calls, [R]; NaN where none is known."""
        found = np.full(len(self.spans), np.nan)
        np.fmax.at(found, self.replay, values[self.row])
        return found

    def mean(self, values: npt.NDArray) -> Floats:
        """Return the mean of each replay's known values, [R]; NaN where there is none."""
        known = ~np.isnan(values[self.row])
        replay, size = self.replay[known], len(self.spans)
        total = np.bincount(replay, values[self.row[known]], size)
        counts = np.bincount(replay, minlength=size)
        return np.divide(total, counts, out=np.full(size, np.nan), where=counts > 0)

    def slice_args(self) -> Iterator[dict[str, Any]]:
        """Yield each replay's arguments, shown on a click: one line per layer."""
        calls, clock = self.placed.calls, self.placed.clock
        figures = {name: known_values(figure(self)) for name, figure in REPLAY_FIGURES.items()}
        starts = np.flatnonzero(np.diff(self.replay)) + 1
        for i, rows in enumerate(np.split(self.row, starts) if len(self.row) else ()):
            yield {
                "in graph": True,
                "clock": str(clock[rows[0]]),
                "step": int(calls.step[rows[0]]),
                "stage": str(calls.stage[rows[0]]),
                "layers": len(rows),
                **{name: values[i] for name, values in figures.items()},
                **{calls.keys[calls.router[row]].site: self.placed.line(row) for row in rows.tolist()},
            }


def _is_on_device(calls: CallTable) -> Mask:
    in_graph = _is_known(calls.places.span("host", "graph")) & _is_known(calls.places.span("device", "graph"))
    own = (_is_known(calls.places.span("device", kind)) for kind in ("router", "block"))
    return np.logical_or.reduce([in_graph, *own])


def experts_range_us(calls: CallTable) -> Floats:
    """Return the duration of each call's experts, [N], with dispatch, combine and gaps; NaN without a place.

    It is on the clock that the band draws.
    """
    device, host = (calls.duration_us(side, "experts") for side in ("device", "host"))
    return np.where(_is_on_device(calls), device, host)


def _layer_spans(spans: Mapping[RangeKind, Floats]) -> Floats:
    router, experts, block, graph = (spans[kind] for kind in ("router", "experts", "block", "graph"))
    end_us = np.fmax(router.sum(1), experts.sum(1))
    layer = np.stack([router[:, 0], end_us - router[:, 0]], axis=1)
    return np.where(_is_known(block)[:, None], block, np.where(_is_known(router)[:, None], layer, graph))


def _is_known(span: Floats) -> Mask:
    return ~np.isnan(span[:, 0])


# -- figures --------------------------------------------------------------------------------------------


def _expert_tflops(placed: PlacedCalls) -> Floats:
    experts_us, flops = placed.spans["experts"][:, 1], placed.calls.expert_flops
    known = (experts_us > 0) & (flops > 0) & (not placed.experts_are_split)
    return np.divide(flops, experts_us, out=np.full(len(placed), np.nan), where=known) / 1e6


def _skipped_share(placed: PlacedCalls) -> Floats:
    skipped, slots = placed.calls.skipped, placed.calls.tokens * placed.calls.top_k
    return np.divide(100 * skipped, slots, out=np.full(len(placed), np.nan), where=skipped > 0)


FIGURES: dict[str, Callable[[PlacedCalls], npt.NDArray]] = {
    "load max÷mean": lambda placed: placed.loads.max_over_mean,
    "router entropy (nats)": lambda placed: placed.calls.router_entropy,
    "active experts": lambda placed: placed.loads.active_experts,
    "expert TFLOP/s (with gaps)": _expert_tflops,
    "skipped slots (%)": _skipped_share,
}
"""[N] one value per call; NaN where there is none."""

REPLAY_NAME = "graph"
REPLAY_FIGURES: dict[str, Callable[[Replays], Floats]] = {
    "load max÷mean (graph: worst layer)": lambda r: r.worst(r.placed.loads.max_over_mean),
    "load max÷mean (graph: mean)": lambda r: r.mean(r.placed.loads.max_over_mean),
    "router entropy (nats) (graph: mean)": lambda r: r.mean(r.placed.calls.router_entropy),
    "active experts (graph: mean)": lambda r: r.mean(r.placed.loads.active_experts),
}
"""[R] one value per replay; their names say that they cover all its layers."""
