"""A study of routes as JSON; docs/routes_study.md has the keys."""

from __future__ import annotations

from typing import Any

from moe_trace.data.display.json import json_text
from moe_trace.read.routes.study import LayerStudy, RoutesStudy

_PAIRS = 20


def render_study_json(study: RoutesStudy, *, matrices: bool = False) -> str:
    """Indented JSON text; NaN is null.

    Args:
        matrices: with the [E, E] counts of co-activation and transitions, which grow with E squared.
    """
    return json_text(_group(study, matrices))


def _group(study: RoutesStudy, matrices: bool) -> dict[str, Any]:
    layers = [_layer(layer, matrices) for layer in study.layers]
    return {**vars(study), "layers": layers, "others": [_group(other, matrices) for other in study.others]}


def _layer(layer: LayerStudy, matrices: bool) -> dict[str, Any]:
    pairs = layer.coactivation.strongest(_PAIRS)
    entries: dict[str, Any] = {"strongest": [{"i": i, "j": j, "probability": p} for i, j, p in pairs]}
    transition = None if layer.transition is None else dict(vars(layer.transition))
    if matrices:
        entries["together"] = layer.coactivation.together
    elif transition is not None:
        del transition["counts"]
    return {**vars(layer), "coactivation": entries, "transition": transition}
