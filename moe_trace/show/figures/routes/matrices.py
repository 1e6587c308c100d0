"""Figures of routes as matrices: co-activation of experts, and transitions to the next layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.display.columns import Cell
from moe_trace.data.display.load_picture import DIVERGING
from moe_trace.data.layer_labels import layer_labels
from moe_trace.read.routes.study import LayerStudy, RoutesStudy
from moe_trace.show.figures.figure import Figure, Frame, Spec, cap_said, colour_cap, heat_map

CELLS_MAX = 120_000
"""Maximum number of cells over all layers of a figure. Beyond it, only the most used experts are drawn."""
EXPERTS_MIN = 16
PAIRS_NAMED = 3
SIDE_PX = 520
_Map = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""Map of one layer: its label, the experts of the rows and of the columns, the values."""


def site_labels(found: RoutesStudy) -> list[str]:
    """Return short names of the layers."""
    return [label for label, _ in layer_labels([layer.layer for layer in found.layers])]


def coactivation_map(found: RoutesStudy) -> Figure:
    """Plot P(j | i) for every two experts of a layer."""
    labels, chosen = site_labels(found), [_most_used(layer, len(found.layers)) for layer in found.layers]
    pairs = "all pairs of a token's experts" if found.pairs == "all" else "experts of neighbouring slots"
    return _heat_maps(
        Figure(
            key="coactivation",
            title="Experts chosen together",
            caption="P(j | i): of the tokens that chose expert i (row), the share that chose expert "
            f"j (column), too; {pairs}.{_left_out_note(found, chosen)} The table has the strongest pairs.",
            data=[],
            layout=_square_layout("expert j", "expert i"),
            headings=("layer", "expert i", "expert j", "P(j | i)"),
            rows=[
                (site, i, j, p)
                for site, layer in zip(labels, found.layers, strict=True)
                for i, j, p in layer.coactivation.strongest(PAIRS_NAMED)
            ],
        ),
        [
            (site, e, e, layer.coactivation.probability[np.ix_(e, e)])
            for site, layer, e in zip(labels, found.layers, chosen, strict=True)
        ],
        hover="of the tokens with expert %{y}, %{z:.1%} have expert %{x}, too",
    )


def transition_map(found: RoutesStudy) -> Figure:
    """Plot P(e' | e) from each layer to the next."""
    labels, chosen = site_labels(found), [_most_used(layer, len(found.layers)) for layer in found.layers]
    maps: list[_Map] = []
    rows: list[tuple[Cell, ...]] = []
    for i, layer in enumerate(found.layers):
        if layer.transition is None:
            continue
        name, experts, next_experts = f"{labels[i]} to {labels[i + 1]}", chosen[i], chosen[i + 1]
        maps.append(
            (name, experts, next_experts, layer.transition.probability[np.ix_(experts, next_experts)])
        )
        recall = (layer.transition.recall, layer.transition.recall_by_load)
        rows.append((name, *(known(number) for number in recall)))
    return _heat_maps(
        Figure(
            key="transition",
            title="From layer to layer",
            caption="P(e' | e): of the tokens with an expert in one layer (row), the share with an expert "
            f"of the next (column).{_left_out_note(found, chosen)} Recall: of the experts that held-out "
            "tokens use in the next layer, the share that this layer's predict, and what the most used give.",
            data=[],
            layout=_square_layout("expert of the next layer", "expert of the layer"),
            headings=("layers", "recall", "recall of the most used"),
            rows=rows,
        ),
        maps,
        hover="of the tokens with expert %{y}, %{z:.1%} have %{x} in the next layer",
    )


def known(number: float, digits: int = 4) -> float | None:
    """Round a number; return None for NaN, which JSON does not have."""
    return None if math.isnan(number) else round(float(number), digits)


def _most_used(layer: LayerStudy, layers: int) -> np.ndarray:
    """Return the ids of the experts to draw, ascending: all, or the most used if there are too many."""
    max_experts = max(EXPERTS_MIN, math.isqrt(CELLS_MAX // max(1, layers)))
    return np.sort(np.argsort(-layer.counts, kind="stable")[:max_experts])


def _left_out_note(found: RoutesStudy, chosen: Sequence[np.ndarray]) -> str:
    if all(len(e) == layer.num_experts for e, layer in zip(chosen, found.layers, strict=True)):
        return ""
    return f" Drawn are the {max(map(len, chosen))} most used experts of each layer."


def _square_layout(columns: str, rows: str) -> Spec:
    category = {"type": "category", "nticks": 32}
    return {
        "height": SIDE_PX,
        "xaxis": {"title": {"text": columns}, **category},
        "yaxis": {"title": {"text": rows}, "autorange": "reversed", **category},
    }


def _heat_maps(figure: Figure, maps: Sequence[_Map], *, hover: str) -> Figure:
    values = np.concatenate([np.zeros(0), *(values.ravel() for *_, values in maps)])
    values = values[values > 0]  # also drops NaN
    if not len(values):
        return figure
    cap = colour_cap(values, least=0.05)
    traces: list[Spec] = [
        {
            "x": [f"e{e}" for e in columns.tolist()],
            "y": [f"e{e}" for e in rows.tolist()],
            "z": [[known(v, 3) for v in row] for row in cells.tolist()],
        }
        for _, rows, columns, cells in maps
    ]
    data = heat_map(
        **traces[0],
        unit="",
        hover=hover,
        colorscale=[[0.0, DIVERGING[2]], [0.5, DIVERGING[3]], [1.0, DIVERGING[4]]],
        zmin=0.0,
        zmax=cap,
        colorbar={"tickformat": ".0%", "thickness": 14},
    )
    frames = [Frame(label=matrix[0], traces=[trace]) for matrix, trace in zip(maps, traces, strict=True)]
    return replace(
        figure,
        caption=figure.caption + cap_said(cap, values),
        data=[data],
        frames=frames if len(frames) > 1 else [],
        slider="Layer",
    )
