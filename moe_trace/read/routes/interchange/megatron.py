"""Megatron-LM's router trace (`--moe-routing-trace-path`): a JSON line for each step, layer and rank.

    {"step": 0, "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 128, "topk": 8,
     "top_indices": [[12, 45, ...], ...]}

A layer that occurs again within a step is another forward, as for a microbatch. If the router returned a
mask, Megatron's tracer lists a token's experts by number, so their ranks are unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_trace.data.errors import TraceFileError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.interchange.arrays import Capture

LayerKey = tuple[str, int, int]
"""(block, its index, layer)"""


def is_router_trace(values: list[Any]) -> bool:
    """Return whether JSON lines are a router trace."""
    return bool(values) and isinstance(values[0], dict) and "top_indices" in values[0]


def capture_of_router_trace(values: list[Any], source: str) -> Capture:
    """Read the forwards in order, each with all layers that any of them has.

    Raises:
        TraceFileError: A line is not a record of a layer, or layers of one forward have different tokens.
    """
    forwards: dict[tuple[int, int], dict[LayerKey, np.ndarray]] = {}
    seen: dict[tuple[int, LayerKey], int] = {}
    rank = 0
    for number, value in enumerate(values, 1):
        try:
            step, rank = int(value["step"]), int(value.get("rank", 0))
            key = (str(value.get("block", "decoder")), int(value.get("mtp_idx", 0)), int(value["layer"]))
            ids = np.array(value["top_indices"], np.int64)
            if ids.ndim != 2:
                raise ValueError(f"top_indices of shape {ids.shape}")
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise TraceFileError(
                f"{source}: found no record of a layer in line {number} ({error!s:.100}); expected step, "
                "layer and top_indices of [tokens, top_k]"
            ) from error
        occurrence = seen[step, key] = seen.get((step, key), -1) + 1
        forwards.setdefault((step, occurrence), {})[key] = ids
    layers = sorted({key for forward in forwards.values() for key in forward})
    slots = max(ids.shape[1] for forward in forwards.values() for ids in forward.values())
    parts = [_forward(forward, layers, slots, source) for forward in forwards.values()]
    lengths = [len(part) for part in parts]
    return Capture(
        np.concatenate(parts),
        "Megatron",
        layers=tuple(map(_path, layers)),
        step=np.repeat([step for step, _ in forwards], lengths),
        forward=np.repeat(np.arange(len(parts)), lengths),
        rank=rank,
    )


def router_trace_lines(routes: RecordedRoutes) -> Iterator[str]:
    """Yield the lines of a router trace, one for each forward and layer, with consecutive layer numbers."""
    for forward in np.unique(routes.forward):
        rows = np.flatnonzero(routes.forward == forward)
        for layer, slots in enumerate(routes.top_k):
            ids = routes.expert_ids[rows, layer, :slots].astype(np.int64)
            ids[ids == routes.no_expert] = -1
            record = {"step": int(routes.step[rows[0]]), "stage": "pre_dispatch", "block": "decoder"}
            record |= {"layer": layer, "rank": routes.rank, "num_tokens": len(rows), "topk": slots}
            yield json.dumps({**record, "top_indices": ids.tolist()})


def _forward(
    forward: dict[LayerKey, np.ndarray], layers: list[LayerKey], slots: int, source: str
) -> np.ndarray:
    tokens = {len(ids) for ids in forward.values()}
    if len(tokens) > 1:
        raise TraceFileError(
            f"{source}: found {min(tokens)} and {max(tokens)} tokens in layers of one step; expected the "
            "same tokens in all layers. Is a part of the trace missing?"
        )
    ids_TLK = np.full((tokens.pop(), len(layers), slots), -1, np.int64)
    for place, key in enumerate(layers):
        if key in forward:
            ids_TLK[:, place, : forward[key].shape[1]] = forward[key]
    return ids_TLK


def _path(key: LayerKey) -> str:
    block, index, layer = key
    if block == "mtp":
        return f"mtp.layers.{index}.mtp_model_layer.layers.{layer}.mlp.router"
    return f"{block}.layers.{layer}.mlp.router"
