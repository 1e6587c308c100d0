"""Figures as plotly specifications (dicts, without plotly itself) with a caption and a table of the data.

The HTML report and the TensorBoard tab draw the same figures. Names come from a file, and plotly interprets a
subset of HTML in texts, so every name is escaped here. Colours that depend on the theme are left to the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_trace.data.display.columns import Cell

Spec = dict[str, Any]

TABLE_ROWS_MAX = 200
ROW_PX, ROW_MIN_PX, ROWS_MAX_PX = 24, 9, 620  # for heat maps with one row per layer

# Okabe and Ito's palette, distinguishable with any kind of colour vision, on light and dark backgrounds.
PHASE_COLOURS = {
    "router": "#0072B2",
    "dispatch": "#E69F00",
    "experts": "#009E73",
    "combine": "#CC79A7",
    "shared": "#56B4E9",
    "other": "#999999",
    "gap": "rgba(128,128,128,0.25)",
}
LINES = ("#D55E00", "#0072B2", "#CC79A7", "#009E73")
DASHED = {"color": "#888888", "dash": "dash"}
"""Style of reference lines."""
BAND, INNER_BAND = "rgba(128,128,128,0.22)", "rgba(128,128,128,0.45)"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One position of a figure's slider."""

    label: str
    z: list[list[float | None]] = field(default_factory=list)
    """Values of a heat map."""
    traces: list[Spec] = field(default_factory=list)
    """For other figures: what changes in each trace."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot with a caption and a table of the same data."""

    key: str
    title: str
    caption: str
    """What is shown and how to read it."""
    data: list[Spec]
    layout: Spec
    headings: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    frames: list[Frame] = field(default_factory=list)
    """Positions of a slider; the first is the one shown by `data`."""
    slider: str = "Step"
    """What the slider selects."""


def safe(name: object) -> str:
    """Escape and shorten a name for use in a plotly text."""
    return html.escape(str(name)[:80])


def colour_cap(values: Sequence[float] | np.ndarray, *, least: float = 0.0) -> float:
    """Return the end of a colour scale: 4 times the upper quartile, at least `least`, at most the maximum.

    Higher values have the same colour, so that one outlier does not make the others look alike.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return least
    return float(min(known.max(), max(least, 4 * np.percentile(known, 75))))


def cap_said(cap: float, values: Sequence[float] | np.ndarray) -> str:
    """Return a note for the caption, empty if the scale reaches the highest value."""
    return f" The colour ends at {cap:.3g}: what is higher looks the same." if cap < np.nanmax(values) else ""


def rows_px(rows: int) -> int:
    """Return the height of a heat map with a row per layer. Many rows are lower, so that it fits a screen."""
    return rows * max(ROW_MIN_PX, min(ROW_PX, ROWS_MAX_PX // max(1, rows)))


def bars(
    name: str, x: Sequence[str], y: Sequence[float | None], colour: str, hover: str, **more: Any
) -> Spec:
    """Return a bar for each of `x`; `hover` is the text shown under the pointer, by default its value."""
    hover_options = {"hovertemplate": hover} if hover else {}
    spec: Spec = {"type": "bar", "name": name, "x": [safe(label) for label in x], "y": y}
    return {**spec, "marker": {"color": colour}, **hover_options, **more}


def curve(name: str, x: Sequence[Any], y: Sequence[float | None], hover: str = "", **more: Any) -> Spec:
    """Return a line through `y`; `hover` is the text shown under the pointer, by default none."""
    hover_options = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        **hover_options,
        **more,
    }


def axis(title: str, **more: Any) -> Spec:
    """Return an axis with a title that starts at 0 unless `rangemode` says otherwise."""
    return {"title": {"text": title}, "rangemode": "tozero", **more}


def bars_layout(unit: str, height: int, **more: Any) -> Spec:
    """Return the layout of figures with a bar, or a group of bars, per layer."""
    return {"xaxis": layer_columns(), "yaxis": axis(unit), "height": height, **more}


def layers_map(
    layers: Sequence[str], columns: Sequence[Any], z: list[list[Any]], unit: str, hover: str, **more: Any
) -> tuple[Spec, Spec]:
    """Return data and layout of a heat map with a row per layer; `hover` is the text shown on a cell."""
    labels = [safe(layer) for layer in layers]
    layout = {
        "xaxis": {"type": "category"},
        "yaxis": layers_axis(labels),
        "height": 120 + rows_px(len(labels)),
    }
    return heat_map(z, columns, labels, unit, hover, **more), layout


def heat_map(
    z: list[list[Any]], x: Sequence[Any], y: Sequence[str], unit: str, hover: str, **more: Any
) -> Spec:
    """Return a heat map with cells at `x` and `y`; `hover` is the text shown on a cell."""
    return {
        **{"type": "heatmap", "z": z, "x": x, "y": y, "colorscale": "Viridis"},
        "colorbar": {"title": {"text": unit}, "thickness": 14},
        "hovertemplate": f"{hover}<extra></extra>",
        **more,
    }


def layer_columns() -> Spec:
    """Return the horizontal axis of figures with a bar per layer; labels that would not fit are omitted."""
    return {"type": "category", "nticks": 32}


def ids_axis(title: str, count: int) -> Spec:
    """Return the horizontal axis of a heat map with a column per expert: at most 16 integer ticks."""
    step = next(
        size for size in (10**n * digit for n in range(9) for digit in (1, 2, 5)) if size * 16 >= count
    )
    return {"title": {"text": title}, "tick0": 0, "dtick": step}


def layers_axis(labels: Sequence[str]) -> Spec:
    """Return the vertical axis of a heat map, first layer on top, with as many labels as fit."""
    every = max(1, -(-15 * len(labels) // max(1, rows_px(len(labels)))))
    ticks = list(labels[::every])
    return {
        "autorange": "reversed",
        "type": "category",
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": ticks,
    }
