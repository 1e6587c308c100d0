"""Figures of a metric of every layer over time, for any number of layers and forwards.

A few layers are drawn as lines. More are drawn as a heat map of layers x forwards and, below it, the spread
over layers: median, quartiles and extremes, with outlier layers by name. A single forward is drawn as bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.display.columns import Cell
from moe_trace.show.figures.call_grid import CallGrid, Columns, grouped_columns
from moe_trace.show.figures.figure import (
    BAND,
    INNER_BAND,
    LINES,
    Figure,
    Spec,
    axis,
    bars,
    bars_layout,
    cap_said,
    colour_cap,
    curve,
    heat_map,
    layers_axis,
    rows_px,
    safe,
)

LINES_MAX = 4  # layers that are distinguishable as lines
NAMED = 3
BAND_PX, GAP_PX = 190, 56
Extreme = Literal["highest", "lowest"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The metric to draw."""

    key: str
    title: str
    unit: str
    caption: str
    worst: Extreme
    """Whether the layers with the highest or the lowest mean are named."""
    row: str = "layer"
    """What a row of the grid represents."""


def metric_over_time(grid: CallGrid | None, metric: Metric) -> Figure:
    """Return the figure that suits the number of layers and forwards; without data if there is no grid."""
    data: list[Spec] = []
    layout: Spec = {}
    title, notes = f"{metric.title} over time", []
    if grid is not None:
        columns = grouped_columns(grid)
        if grid.values_LC.size == 1:
            pass  # a single value needs no figure
        elif len(columns.labels) == 1:
            data, layout = _bars(grid, columns, metric)
            title = f"{metric.title} of each {metric.row}"
            notes.append(f" Coloured: the {metric.worst}.")
        elif len(grid.sites) <= LINES_MAX:
            data, layout = _lines(grid, columns, metric)
        else:
            data, layout = _map_and_spread(grid, columns, metric)
            notes.append(cap_said(data[0]["zmax"], columns.values_LB))
        notes.append(_constant_note(grid))
    return Figure(
        key=metric.key,
        title=title,
        caption=metric.caption + "".join(notes),
        data=data,
        layout=layout,
        headings=(metric.row, "calls", "lowest", "mean", "highest"),
        rows=_rows(grid) if grid is not None else [],
    )


def _constant_note(grid: CallGrid) -> str:
    low, high = float(np.nanmin(grid.values_LC)), float(np.nanmax(grid.values_LC))
    return f" Every call of every layer has {low:.4g}." if low == high and len(grid.sites) > 1 else ""


def _rows(grid: CallGrid) -> list[tuple[Cell, ...]]:
    return [
        (site, int((~np.isnan(row)).sum()), float(np.nanmin(row)), float(mean), float(np.nanmax(row)))
        for site, row, mean in zip(grid.sites, grid.values_LC, grid.means_L(), strict=True)
    ]


def worst_layers(grid: CallGrid, extreme: Extreme, most: int = NAMED) -> list[int]:
    """Return the rows of the layers with the most extreme mean, worst first; none if all means are equal."""
    means_L = grid.means_L()
    if np.ptp(means_L) == 0:
        return []
    return [int(i) for i in np.argsort(-means_L if extreme == "highest" else means_L, kind="stable")[:most]]


def _bars(grid: CallGrid, columns: Columns, metric: Metric) -> tuple[list[Spec], Spec]:
    values_L = columns.values_LB[:, 0]
    worst = worst_layers(grid, metric.worst, min(NAMED, len(grid.sites) // 2))
    ties = set(np.flatnonzero(np.isin(values_L, values_L[worst])).tolist())  # many may tie at a maximum
    coloured = ties if len(ties) <= len(grid.sites) // 2 else set()
    colours = [LINES[0] if i in coloured else BAND for i in range(len(grid.sites))]
    hover = f"%{{x}}: %{{y:.3f}} {metric.unit}<extra></extra>"
    data = bars(metric.title, grid.sites, _plain(values_L), "", hover, marker={"color": colours})
    return [data], bars_layout(metric.unit, 280, showlegend=False)


def _lines(grid: CallGrid, columns: Columns, metric: Metric) -> tuple[list[Spec], Spec]:
    data = [
        _line(safe(site), columns, columns.values_LB[i], metric, colour)
        for i, (site, colour) in enumerate(zip(grid.sites, LINES, strict=False))
    ]
    return data, {
        "xaxis": _forwards_axis(columns),
        "yaxis": axis(metric.unit),
        "height": 320,
        "showlegend": len(data) > 1,
    }


def _map_and_spread(grid: CallGrid, columns: Columns, metric: Metric) -> tuple[list[Spec], Spec]:
    map_px = rows_px(len(grid.sites))
    share = BAND_PX / (BAND_PX + GAP_PX + map_px)
    colorbar = {"title": {"text": metric.unit}, "thickness": 14, "len": 1 - share, "y": (1 + share) / 2}
    cells = heat_map(
        [_plain(row) for row in columns.values_LB],
        columns.labels,
        [safe(site) for site in grid.sites],
        metric.unit,
        f"%{{y}}, {columns.title} %{{x}}: %{{z:.3f}} {metric.unit}",
        yaxis="y2",
        zmin=float(np.nanmin(columns.values_LB)),
        zmax=colour_cap(columns.values_LB),
        colorbar=colorbar,
    )
    layout: Spec = {
        "xaxis": {**_forwards_axis(columns), "anchor": "y"},
        "yaxis": {"title": {"text": metric.unit}, "domain": [0, round(share, 4)]},
        "yaxis2": {
            **layers_axis([safe(site) for site in grid.sites]),
            "domain": [round(share + GAP_PX / (BAND_PX + GAP_PX + map_px), 4), 1],
        },
        "legend": {"y": round(share, 4), "yanchor": "bottom", "traceorder": "normal"},
        "height": 90 + BAND_PX + GAP_PX + map_px,
        "hovermode": "closest",
    }
    return [cells, *_layer_bands(columns, metric), *_worst_lines(grid, columns, metric)], layout


def _layer_bands(columns: Columns, metric: Metric) -> list[Spec]:
    """Return extremes, quartiles and median over the layers as two bands and a line."""
    with np.errstate(invalid="ignore"):
        low, q1, median, q3, high = np.nanpercentile(columns.values_LB, (0, 25, 50, 75, 100), axis=0)
    bands: list[Spec] = []
    for name, bottom, top, fill in (("all layers", low, high, BAND), ("middle half", q1, q3, INNER_BAND)):
        edge: Spec = {"line": {"width": 0, "color": fill}, "legendgroup": name}
        bands.append(curve(name, columns.labels, _plain(bottom), **edge, showlegend=False))
        bands.append(curve(name, columns.labels, _plain(top), **edge, fill="tonexty", fillcolor=fill))
    middle = _line("median layer", columns, median, metric, "#888888")
    return [*bands, {**middle, "line": {"width": 2, "color": "#888888", "dash": "dot"}}]


def _worst_lines(grid: CallGrid, columns: Columns, metric: Metric) -> list[Spec]:
    means_L = grid.means_L()
    return [
        _line(
            f"{safe(grid.sites[i])} ({metric.worst if n == 0 else 'next'}, mean {means_L[i]:.3g})",
            columns,
            columns.values_LB[i],
            metric,
            LINES[n],
        )
        for n, i in enumerate(worst_layers(grid, metric.worst))
    ]


def _line(name: str, columns: Columns, values: npt.NDArray[np.float64], metric: Metric, colour: str) -> Spec:
    hover = f"{name}, {columns.title} %{{x}}: %{{y:.3f}} {metric.unit}"
    mode = "lines+markers" if len(columns.labels) <= 40 else "lines"
    style = {"mode": mode, "line": {"width": 1.5, "color": colour}, "marker": {"size": 4}}
    return curve(name, columns.labels, _plain(values), hover, **style)


def _forwards_axis(columns: Columns) -> Spec:
    return {
        "type": "category",
        "title": {"text": columns.title},
        "tickmode": "array",
        "tickvals": list(columns.ticks),
        "ticktext": list(columns.ticks.values()),
        "tickangle": 0,
    }


def _plain(values: Sequence[float] | npt.NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.4g}") for v in np.asarray(values, dtype=np.float64).tolist()]
