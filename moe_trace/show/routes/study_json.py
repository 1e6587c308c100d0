"""A study of routes as JSON; docs/routes_study.md has the keys."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from moe_trace.data.display.json import without_nonfinite
from moe_trace.read.routes.study import LayerStudy, RoutesStudy

_PAIRS = 20


def render_study_json(study: RoutesStudy, *, matrices: bool = False) -> str:
    """Indented JSON text; NaN is null.

    Args:
        matrices: with the [E, E] counts of co-activation and transitions, which grow with E squared.
    """
    return json.dumps(_group(study, matrices), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _group(study: RoutesStudy, matrices: bool) -> dict[str, Any]:
    plain = {
        field.name: plain_of(getattr(study, field.name))
        for field in fields(study)
        if field.name not in ("layers", "others")
    }
    plain["layers"] = [_layer(layer, matrices) for layer in study.layers]
    plain["others"] = [_group(other, matrices) for other in study.others]
    return plain


def _layer(layer: LayerStudy, matrices: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {
        field.name: plain_of(getattr(layer, field.name))
        for field in fields(layer)
        if field.name not in ("coactivation", "transition")
    }
    pairs = layer.coactivation.strongest(_PAIRS)
    plain["coactivation"] = {"strongest": [{"i": i, "j": j, "probability": p} for i, j, p in pairs]}
    if matrices:
        plain["coactivation"]["together"] = layer.coactivation.together.tolist()
    transition = plain_of(layer.transition)
    if transition is not None and not matrices:
        del transition["counts"]
    plain["transition"] = transition
    return plain


def plain_of(value: Any) -> Any:
    """Dataclasses as dicts, arrays as lists, NaN as None."""
    if isinstance(value, np.ndarray):
        return without_nonfinite(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        if any(isinstance(getattr(value, field.name), np.ndarray) for field in fields(value)):
            return {field.name: plain_of(getattr(value, field.name)) for field in fields(value)}
        return without_nonfinite(asdict(value))
    if isinstance(value, dict):
        return {key: plain_of(inner) for key, inner in value.items()}
    return without_nonfinite(value)
