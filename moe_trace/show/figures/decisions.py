"""Figures of routing decisions: load balance and confidence over time, and experts used per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.summary import RouterSummary
from moe_trace.show.figures.call_grid import call_grid
from moe_trace.show.figures.figure import Figure, Spec, axis, bars, layer_columns, safe
from moe_trace.show.figures.metric_over_time import Metric, metric_over_time

LAYER_FIGURE_PX = 270

LOAD = Metric(
    key="load",
    title="Load max÷mean",
    unit="max÷mean",
    caption="The busiest expert's assignments over the mean, call by call. Short calls (decoding) are "
    "uneven by chance: one token cannot reach all experts.",
    worst="highest",
)
ENTROPY = Metric(
    key="entropy",
    title="Router entropy",
    unit="nats",
    caption="How undecided the router is, in nats: 0 is certain, ln E is no preference at all.",
    worst="lowest",
)
CONFIDENCE = Metric(
    key="confidence",
    title="Router confidence",
    unit="confidence",
    caption="1 − H/ln E, call by call: 0 is undecided, 1 is certain.",
    worst="lowest",
)
SLOTS = Metric(
    key="slots",
    title="Skipped and padding assignments",
    unit="assignments",
    caption="Assignments without an expert, and those that padding tokens made, call by call.",
    worst="highest",
    row="slots",
)


def load_over_time(calls: CallTable) -> Figure:
    """Plot load max÷mean of each call."""
    loads = calls.assignments
    with np.errstate(invalid="ignore"):
        values_N = loads.largest() / (loads.totals() / loads.sizes)
    return metric_over_time(call_grid(calls, values_N), LOAD)


def entropy_over_time(calls: CallTable) -> Figure:
    """Plot router entropy of each call."""
    return metric_over_time(call_grid(calls, calls.router_entropy), ENTROPY)


def lost_slots_over_time(calls: CallTable) -> Figure:
    """Plot the skipped slots of one layer and the assignments made by padding, where there are any."""
    lost = {
        name: call_grid(calls, np.array(calls.values(column), np.float64))
        for name, column in (("skipped", "skipped"), ("padding", "padding_assignments"))
    }
    known = {name: grid for name, grid in lost.items() if grid is not None and grid.values_LC.any()}
    grid = None
    if known:
        values = np.concatenate([metric.values_LC for metric in known.values()])
        grid = replace(next(iter(known.values())), sites=tuple(known), values_LC=values)
    return metric_over_time(grid, SLOTS)


def layer_figures(router: RouterSummary, calls: CallTable, counts_E: np.ndarray, label: str) -> list[Figure]:
    """Return one layer's figures: load sorted and over time, entropy, confidence, slots used, lost slots.

    Args:
        calls: calls of that layer alone.
        counts_E: assignments of the chosen steps.
        label: name of those steps.
    """
    found = [
        sorted_load(router.info.site, counts_E, label),
        load_over_time(calls),
        entropy_over_time(calls),
        metric_over_time(call_grid(calls, calls.confidence), CONFIDENCE),
        k_histogram([router]),
        lost_slots_over_time(calls),
    ]
    return [
        replace(figure, layout={**figure.layout, "height": LAYER_FIGURE_PX})
        for figure in found
        if figure.data
    ]


def sorted_load(site: str, counts_E: np.ndarray, label: str) -> Figure:
    """Plot the load of a layer's experts over an equal share, busiest first."""
    total = int(counts_E.sum())
    order = np.argsort(-counts_E, kind="stable")
    ratios = [float(counts_E[e]) * len(counts_E) / total if total else 0.0 for e in order]
    data = [
        bars(
            "load",
            [str(int(e)) for e in order],
            [round(r, 4) for r in ratios],
            "",
            "expert %{x}: %{customdata:,} assignments, %{y:.2f}× equal share<extra></extra>",
            customdata=[int(counts_E[e]) for e in order],
            marker={"color": ["#B35806" if r > 1 else "#2166AC" for r in ratios]},
            showlegend=False,
        )
    ]
    return Figure(
        key="sorted",
        title=f"Load of {safe(site)}, sorted",
        caption=f"Assignments of each expert over an equal share, busiest first; {label}.",
        data=data if total else [],
        layout={
            "xaxis": {"type": "category", "title": {"text": "expert"}, "nticks": 32},
            "yaxis": axis("× equal share"),
            "shapes": [_equal_share_line()],
            "height": 300,
        },
        headings=("expert", "assignments", "× equal share"),
        rows=[(int(e), int(counts_E[e]), ratio) for e, ratio in zip(order, ratios, strict=True)],
    )


def _equal_share_line() -> dict[str, object]:
    line = {"color": "#888888", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": line}


def k_histogram(routers: Sequence[RouterSummary]) -> Figure:
    """Plot tokens by the number of experts they used; no data if each token used its layer's k."""
    routers = [r for r in routers if sum(r.decisions.k_histogram)]
    length = max((len(r.decisions.k_histogram) for r in routers), default=0)
    counts_LK = [[*r.decisions.k_histogram, *[0] * (length - len(r.decisions.k_histogram))] for r in routers]
    used = [k for k in range(length) if any(counts[k] for counts in counts_LK)]
    sites = [safe(r.info.site) for r in routers]
    return Figure(
        key="k",
        title="Experts used per token",
        caption="Share of tokens by the number of experts that each used: below k, assignments were skipped.",
        data=[_slots_bar(k, sites, counts_LK) for k in used] if len(used) > 1 else [],
        layout={
            "barmode": "stack",
            "legend": {"traceorder": "normal"},
            "xaxis": layer_columns(),
            "yaxis": {"title": {"text": "share of tokens"}, "tickformat": ".0%", "range": [0, 1]},
            "height": 300,
        },
        headings=("layer", *(f"{k} experts" for k in range(length))),
        rows=[(r.info.site, *counts) for r, counts in zip(routers, counts_LK, strict=True)],
    )


def _slots_bar(k: int, sites: list[str], counts_LK: list[list[int]]) -> Spec:
    return {
        "type": "bar",
        "name": f"{k} experts",
        "x": sites,
        "y": [round(counts[k] / sum(counts), 5) for counts in counts_LK],
        "hovertemplate": f"%{{x}}: %{{y:.2%}} of tokens use {k} experts<extra></extra>",
    }
