"""Gating weights of the same tokens and layer under two routings, compared token by token."""

from __future__ import annotations

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.gates import margins


def weight_distance(
    a: RecordedRoutes, rows_a: np.ndarray, b: RecordedRoutes, rows_b: np.ndarray, layers: tuple[int, int]
) -> np.ndarray:
    """[n] sum over experts of |weight in A - weight in B|, 0 for those not chosen; NaN where unrecorded."""
    experts, slots = a.num_experts[layers[0]], a.top_k[layers[0]]
    (ids_a, given_a), (ids_b, given_b) = (
        _chosen(routes, rows, layer, experts, slots)
        for routes, rows, layer in ((a, rows_a, layers[0]), (b, rows_b, layers[1]))
    )
    total, left = np.zeros(len(rows_a), np.float32), given_b.copy()
    for rank_a in range(slots):
        met = np.zeros(len(rows_a), np.float32)
        for rank_b in range(slots):
            equal = (ids_a[:, rank_a] == ids_b[:, rank_b]) & (ids_a[:, rank_a] < experts)
            met += np.where(equal, given_b[:, rank_b], 0)
            left[equal, rank_b] = 0
        total += np.abs(given_a[:, rank_a] - met)
    distance: np.ndarray = total + np.abs(left).sum(axis=1)
    return distance


def recorded_margins(routes: RecordedRoutes, rows: np.ndarray, layer: int) -> np.ndarray:
    """[n] a token's largest weight minus its second; NaN where there are not two, or one is unrecorded."""
    experts = routes.num_experts[layer]
    ids, given = _chosen(routes, rows, layer, experts, routes.top_k[layer])
    return np.where(np.isfinite(given).all(axis=1), margins(given, ids < experts), np.nan)


def _chosen(
    routes: RecordedRoutes, rows: np.ndarray, layer: int, experts: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and weights that are 0 where there is no expert."""
    assert routes.weights is not None
    ids = routes.expert_ids[rows, layer, :slots]
    weights = routes.weights[rows, layer, :slots].astype(np.float32)
    return ids, np.where(ids < experts, weights, np.float32(0))
