"""Routes of given or random ids, for tests that need some."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_trace import RecordedRoutes
from moe_trace.data.routes.columns import id_type


def routes_of(ids: Any, experts: int, **columns: Any) -> RecordedRoutes:
    """Routes with ids [T, L, K]: one sequence of one prefill, unless `columns` say otherwise."""
    ids = np.asarray(ids).astype(id_type(experts))
    tokens, layers, slots = ids.shape
    given = {
        "layers": tuple(f"layers.{i}.gate" for i in range(layers)),
        "num_experts": (experts,) * layers,
        "top_k": (slots,) * layers,
        "padding": np.zeros(tokens, bool),
        "step": np.zeros(tokens, np.int64),
        "forward": np.zeros(tokens, np.int64),
        "sequence": np.zeros(tokens, np.int32),
        "position": np.arange(tokens, dtype=np.int32),
        "stage_codes": np.zeros(tokens, np.uint8),
    }
    return RecordedRoutes(expert_ids=ids, **{**given, **columns})


def random_routes(
    tokens: int, *, layers: int = 4, slots: int = 2, experts: int = 16, seed: int = 0, **columns: Any
) -> RecordedRoutes:
    """The same with random experts for each token and layer, all different."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(2)[:, :, :slots]
    return routes_of(ids, experts, **columns)


def decoded_routes(experts: list[list[int]], position: Any = None) -> RecordedRoutes:
    """One layer of four experts, one sequence, one token a decode step."""
    tokens = len(experts)
    position = np.arange(tokens) if position is None else position
    return routes_of(
        np.array(experts)[:, None],
        4,
        forward=np.arange(tokens),
        position=np.array(position, np.int32),
        stage_codes=np.ones(tokens, np.uint8),
    )
