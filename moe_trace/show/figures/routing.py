"""Figures of chosen steps, of one layer, and of two recordings against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.load_stats import describe_load
from moe_trace.data.schema import RoutingSample
from moe_trace.data.summary import RouterSummary
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.call_grid import call_grid
from moe_trace.show.figures.decisions import entropy_over_time, k_histogram, load_over_time
from moe_trace.show.figures.expert_heat_map import heat_map_trace
from moe_trace.show.figures.figure import Cell, Figure, axis, bars, ids_axis, layers_axis, rows_px, safe
from moe_trace.show.figures.metric_over_time import Metric, metric_over_time

LAYER_FIGURE_PX = 270


def layer_summary(summary: TraceSummary, router: RouterSummary) -> TraceSummary:
    """The same trace, as if it held that layer alone."""
    samples = tuple(s for s in summary.samples if s.name == router.info.name)
    return replace(summary, routers=(router,), samples=samples, phases=None)


def layer_figures(one: TraceSummary, counts_E: np.ndarray, label: str) -> list[Figure]:
    """Load sorted and over time, entropy, confidence, slots used, skipped and padding of one layer.

    Args:
        one: from `layer_summary`.
        counts_E: assignments of the chosen steps.
        label: names those steps.
    """
    found = [
        sorted_load(one.routers[0].info.site, counts_E, label),
        load_over_time(one),
        entropy_over_time(one),
        confidence_over_time(one.samples),
        k_histogram(one),
        lost_slots_over_time(one.samples),
    ]
    return [
        replace(figure, layout={**figure.layout, "height": LAYER_FIGURE_PX})
        for figure in found
        if figure.data
    ]


def sorted_load(site: str, counts_E: np.ndarray, label: str) -> Figure:
    """The experts of one layer from the busiest to the least used, over an equal share."""
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


def confidence_over_time(samples: Sequence[RoutingSample]) -> Figure:
    """1 − H/ln E of each call."""
    metric = Metric(
        key="confidence",
        title="Router confidence",
        unit="confidence",
        caption="1 − H/ln E, call by call: 0 is undecided, 1 is certain.",
        worst="lowest",
    )
    return metric_over_time(call_grid(samples, lambda sample: sample.confidence), metric)


def lost_slots_over_time(samples: Sequence[RoutingSample]) -> Figure:
    """Slots of one layer that were skipped, and assignments that padding made, where there are any."""
    lost = {
        "skipped": call_grid(samples, lambda sample: sample.skipped),
        "padding": call_grid(samples, lambda sample: sample.padding_assignments),
    }
    known = {name: grid for name, grid in lost.items() if grid is not None and grid.values_LC.any()}
    grid = None
    if known:
        values = np.concatenate([one.values_LC for one in known.values()])
        grid = replace(next(iter(known.values())), sites=tuple(known), values_LC=values)
    metric = Metric(
        key="slots",
        title="Skipped and padding assignments",
        unit="assignments",
        caption="Assignments without an expert, and those that padding tokens made, call by call.",
        worst="highest",
        row="slots",
    )
    return metric_over_time(grid, metric)


def difference_map(a: TraceSummary, b: TraceSummary) -> Figure:
    """B − A of each expert's load over an equal share, for the layers of both."""
    of_b = {router.info.name: router for router in b.routers}
    pairs = [(r, of_b[r.info.name]) for r in a.routers if r.info.name in of_b]
    pairs = [(x, y) for x, y in pairs if sum(x.assignments) and sum(y.assignments)]
    pairs = [(x, y) for x, y in pairs if len(x.assignments) == len(y.assignments)]  # else of other models
    experts = max((len(x.assignments) for x, _ in pairs), default=0)
    z = [_difference(x, y, experts) for x, y in pairs]
    reach = max([0.25, *(abs(v) for row in z for v in row if v is not None)])
    data = heat_map_trace(z, [x.info.site for x, _ in pairs], low=-reach, centre=0.0, high=reach, unit="×")
    data["hovertemplate"] = "layer %{y}, expert %{x}: %{z:+.2f}× equal share<extra></extra>"
    return Figure(
        key="difference",
        title="Load of each expert, B − A",
        caption="How much more (orange) or less (blue) of an equal share each expert gets in B.",
        data=[data] if pairs else [],
        layout={
            "xaxis": ids_axis("expert", experts),
            "yaxis": layers_axis([safe(x.info.site) for x, _ in pairs]),
            "height": 120 + rows_px(len(pairs)),
        },
        headings=(
            "layer",
            "max÷mean A",
            "max÷mean B",
            "largest rise",
            "of expert",
            "largest fall",
            "of expert ",
        ),
        rows=[_difference_row(pair, row) for pair, row in zip(pairs, z, strict=True)],
    )


def _difference(a: RouterSummary, b: RouterSummary, experts: int) -> list[float | None]:
    shares = []
    for router in (a, b):
        counts = np.zeros(experts)
        counts[: len(router.assignments)] = router.assignments
        shares.append(counts * len(router.assignments) / counts.sum())
    return [round(float(v), 4) for v in shares[1] - shares[0]]


def _difference_row(pair: tuple[RouterSummary, RouterSummary], row: list[float | None]) -> tuple[Cell, ...]:
    values = np.array(row, dtype=np.float64)
    loads = [describe_load(router.assignments).max_over_mean for router in pair]
    up, down = int(values.argmax()), int(values.argmin())
    return (pair[0].info.site, *loads, float(values[up]), up, float(values[down]), down)
