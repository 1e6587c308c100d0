"""Figures of a run with several ranks: assignments sent, load of each rank, and cost of the exchange."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.display.columns import Cell
from moe_trace.read.ranks.collective_costs import ExchangeTime
from moe_trace.read.ranks.report import LayerRanks, RankReport
from moe_trace.show.figures.figure import (
    PHASE_COLOURS,
    Figure,
    Spec,
    axis,
    bars,
    bars_layout,
    curve,
    heat_map,
    layers_map,
)

MATRIX_TABLE_MAX = 16
STEPS_NAMED = 20
CELLS_NAMED = 64
_SENT_HOVER = "%{y} to %{x}: %{z:,} assignments"
WAITING, MOVING = "#E69F00", "#0072B2"


def rank_figures(report: RankReport) -> list[Figure]:
    """Return all figures that the report has data for."""
    found = [sent_matrix(report), share_map(report), exchange_bars(report), balance_over_steps(report)]
    return [figure for figure in found if figure.data]


def sent_matrix(report: RankReport) -> Figure:
    """Plot ranks x ranks: assignments sent from the row's rank to the column's, over all layers."""
    layers = [layer.sent for layer in report.layers if layer.sent is not None]
    total = np.sum(layers, axis=0) if layers else np.zeros((0, 0), np.int64)
    columns = [f"rank {rank}" for rank in range(total.shape[1])]
    rows = _names(report) if layers else []
    headings, table = _matrix_table(report, total)
    numbers = _numbers_in(total.size, "%{z:,}")
    return Figure(
        key="rank-sent",
        title="Assignments sent from rank to rank",
        caption="Row: the rank whose tokens they are. Column: the rank that holds the expert. An assignment "
        "is a token with one of its experts; the diagonal stays at home. All layers and steps.",
        data=[heat_map(total.tolist(), columns, rows, "assignments", _SENT_HOVER, **numbers)] if rows else [],
        layout={
            "xaxis": {"type": "category", "title": {"text": "to"}},
            "yaxis": {"type": "category", "autorange": "reversed", "title": {"text": "from"}},
            "height": 160 + min(640, 36 * len(rows)),
        },
        headings=headings,
        rows=table,
    )


def _matrix_table(report: RankReport, total: np.ndarray) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    rows: list[tuple[Cell, ...]] = []
    if total.shape[1] <= MATRIX_TABLE_MAX:
        for rank, row in zip(report.ranks, total.tolist(), strict=False):
            rows.append((f"rank {rank}", *row, sum(row)))
        return ("from", *(f"to rank {to}" for to in range(total.shape[1])), "all"), rows
    for rank, row in zip(report.ranks, total.tolist(), strict=False):
        busiest = int(np.argmax(row))
        rows.append((f"rank {rank}", sum(row), row[rank], f"rank {busiest}", row[busiest]))
    return ("from", "all", "to itself", "most to", "assignments"), rows


def share_map(report: RankReport) -> Figure:
    """Plot layers x ranks: each rank's assignments over those of the mean rank."""
    sites, ranks = [layer.site for layer in report.layers], _names(report)
    over_mean = [_over_mean(layer.load) for layer in report.layers]
    hover = "layer %{y}, %{x}: %{z:.2f} of the mean rank's assignments"
    numbers = _numbers_in(len(sites) * len(ranks), "%{z:.2f}")
    data, layout = layers_map(sites, ranks, over_mean, "÷ mean", hover, **numbers)
    return Figure(
        key="rank-share",
        title="Assignments that each rank computes",
        caption="Over the mean of the ranks, layer by layer: 1 is even. The largest of a row is what the "
        "others wait for.",
        data=[data] if sites else [],
        layout=layout,
        headings=(
            "layer",
            *(("least", "most") if len(ranks) > MATRIX_TABLE_MAX else ranks),
            "max÷mean",
            "hot rank",
            "hot expert",
            "share",
            "wait µs",
            "waited for",
        ),
        rows=[_layer_row(layer, report) for layer in report.layers],
    )


def _names(report: RankReport) -> list[str]:
    return [f"rank {rank}" for rank in report.ranks]


def _layer_row(layer: LayerRanks, report: RankReport) -> tuple[Cell, ...]:
    is_small = len(report.ranks) <= MATRIX_TABLE_MAX
    loads = layer.load if is_small else (min(layer.load), max(layer.load))
    return (
        layer.site,
        *loads,
        layer.max_over_mean,
        None if layer.hot_rank is None else f"rank {layer.hot_rank}",
        None if layer.hot_expert is None else str(layer.hot_expert),
        layer.hot_expert_share,
        layer.wait_us,
        None if layer.waited_for is None else f"rank {layer.waited_for}",
    )


def _over_mean(load: Sequence[int]) -> list[float]:
    mean = sum(load) / len(load)
    return [round(value / mean, 4) if mean else 1.0 for value in load]


def exchange_bars(report: RankReport) -> Figure:
    """Plot the time of each layer's collectives over all ranks, with waiting separate."""
    sites: dict[str, list[ExchangeTime]] = {}
    for exchange in report.exchanges:
        sites.setdefault(exchange.site, []).append(exchange)
    times = [_moving_and_waiting(members) for members in sites.values()]
    parts = [("moving", MOVING), ("waiting for the last rank", WAITING)]
    known = any(exchange.wait_us is not None for exchange in report.exchanges)
    clock = "kernels" if all(exchange.on_device for exchange in report.exchanges) else "the backend's thread"
    return Figure(
        key="rank-exchange",
        title="Collectives of each layer",
        caption=f"Time of the collectives in the MoE layers, over all ranks and calls, by {clock}. Waiting: "
        "from a rank's arrival to that of the last. GB/s: bytes that leave the rank ÷ time without waiting.",
        data=[
            bars(name, list(sites), us, colour, f"%{{x}}: %{{y:,.1f}} µs {name}<extra></extra>")
            for (name, colour), us in zip(
                parts if known else parts[:1], zip(*times, strict=True), strict=False
            )
        ],
        layout=bars_layout("µs", 320, barmode="stack"),
        headings=("layer", "part", "rank", "calls", "bytes", "bytes leaving", "time µs", "wait µs", "GB/s"),
        rows=[_exchange_row(exchange) for exchange in report.exchanges],
    )


def _exchange_row(exchange: ExchangeTime) -> tuple[Cell, ...]:
    moved = (exchange.calls, exchange.bytes_in, exchange.bytes_leaving)
    return (
        exchange.site,
        exchange.part,
        f"rank {exchange.rank}",
        *moved,
        exchange.time_us,
        exchange.wait_us,
        exchange.gb_per_s,
    )


def _moving_and_waiting(members: Sequence[ExchangeTime]) -> tuple[float | None, float | None]:
    """Return their times in µs, or None if a rank's times are incomplete."""
    times = [exchange.time_us for exchange in members if exchange.time_us is not None]
    if len(times) < len(members):
        return None, None
    wait_us = sum(exchange.wait_us or 0.0 for exchange in members)
    return round(sum(times) - wait_us, 3), round(wait_us, 3)


def balance_over_steps(report: RankReport) -> Figure:
    """Plot the imbalance of the ranks' load and the cost of waiting by step."""
    steps = [step.step for step in report.steps]
    data: list[Spec] = [
        _line(steps, [s.imbalance for s in report.steps], "load max÷mean", PHASE_COLOURS["experts"], "y")
    ]
    layout: Spec = {
        "xaxis": {"title": {"text": "step"}, **({"type": "category"} if len(steps) <= STEPS_NAMED else {})},
        "yaxis": axis("load max÷mean"),
        "height": 300,
    }
    if any(step.wait_us is not None for step in report.steps):
        data.append(_line(steps, [s.wait_us for s in report.steps], "wait µs", WAITING, "y2"))
        right_axis = {"overlaying": "y", "tickmode": "auto", "side": "right", "showgrid": False}
        layout["yaxis2"] = axis("wait µs", **right_axis)
    return Figure(
        key="rank-balance",
        title="Balance of the ranks, step by step",
        caption="Load: sum over layers of the busiest rank's assignments ÷ the mean rank's; 1 is even. "
        "Wait: time that all ranks lose waiting for the last, in the MoE layers' collectives.",
        data=data if steps else [],
        layout=layout,
        headings=("step", "load max÷mean", "wait µs", "share"),
        rows=[(str(step.step), step.imbalance, step.wait_us, step.share) for step in report.steps],
    )


def _line(x: Sequence[int], y: Sequence[float | None], name: str, colour: str, yaxis: str) -> Spec:
    steps = list(map(str, x)) if len(x) <= STEPS_NAMED else x
    style = {"mode": "lines+markers", "yaxis": yaxis, "line": {"color": colour}}
    return curve(name, steps, y, f"step %{{x}}: %{{y:.4g}} {name}", **style)


def _numbers_in(cells: int, form: str) -> Spec:
    return {"texttemplate": form} if cells <= CELLS_NAMED else {}
