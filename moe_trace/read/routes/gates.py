"""Gating weights: the weight of each expert in the output, compared with its number of assignments.

- mass: sum of the weights with which an expert was chosen, over that of all experts, next to the share of
  assignments. An expert with less mass than assignments is chosen often and weighs little.
- margin: a token's largest weight minus its second largest. The distance from the k-th expert to the first
  not chosen is unknown, since the weight of the latter is not recorded.
- last: a token's smallest weight over the sum of its weights, which is lost if its last expert is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.expert_pairs import ratio
from moe_trace.read.routes.sets import Floats, Mask
from moe_trace.read.routes.tokens import LayerTokens

CHUNK = 1 << 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class Gates:
    """Gating weights of one layer, over tokens whose weights were recorded."""

    tokens: int
    mass_share: Floats
    """[E] share of the sum of weights."""
    assignment_share: Floats
    """[E] share of the same tokens' assignments."""
    by_rank: Floats
    """[K] mean weight of each slot, in the router's order; NaN where a slot was always skipped."""
    margin: Floats
    """[5] `QUANTILES` over tokens with two experts or more; NaN if there are none."""
    margin_mean: float
    last: Floats
    """[5] `QUANTILES` over the same tokens."""
    last_mean: float


def gates(routes: RecordedRoutes, layer: int, tokens: LayerTokens) -> Gates | None:
    """Compute the gating weights of one layer, or return None if no weights were recorded."""
    if routes.weights is None:
        return None
    experts, slots = tokens.experts, tokens.ids.shape[1]
    mass, chosen = np.zeros(experts + 1), np.zeros(experts + 1, np.int64)
    rank_sum, rank_count, counted = np.zeros(slots), np.zeros(slots, np.int64), 0
    margin_parts, last_parts = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for start in range(0, len(tokens), CHUNK):
        ids, weights, used = chosen_weights(routes, tokens.order.rows[start : start + CHUNK], layer)
        has_weights = np.isfinite(weights).all(axis=1) & used.any(axis=1)
        ids, weights, used = np.minimum(ids[has_weights], experts), weights[has_weights], used[has_weights]
        mass += np.bincount(ids.ravel(), weights.ravel(), minlength=experts + 1)
        chosen += np.bincount(ids.ravel(), minlength=experts + 1)
        rank_sum += weights.sum(axis=0, dtype=np.float64)
        rank_count += used.sum(axis=0)
        counted += len(ids)
        several = used.sum(axis=1) >= 2
        margin_parts.append(margins(weights[several], used[several]))
        last_parts.append(_last(weights[several], used[several]))
    if not counted:
        return None
    margin, last = np.concatenate(margin_parts), np.concatenate(last_parts)
    return Gates(
        tokens=counted,
        mass_share=ratio(mass[:-1], mass[:-1].sum()),
        assignment_share=ratio(chosen[:-1], chosen[:-1].sum()),
        by_rank=ratio(rank_sum, rank_count),
        margin=_quantiles(margin),
        margin_mean=float(margin.mean(dtype=np.float64)) if len(margin) else float("nan"),
        last=_quantiles(last),
        last_mean=float(last.mean(dtype=np.float64)) if len(last) else float("nan"),
    )


def chosen_weights(
    routes: RecordedRoutes, rows: np.ndarray, layer: int
) -> tuple[np.ndarray, np.ndarray, Mask]:
    """Return ids, float32 weights (0 without an expert), and whether there is an expert, each [n, K]."""
    assert routes.weights is not None
    slots = routes.top_k[layer]
    ids = routes.expert_ids[rows, layer, :slots]
    used: Mask = ids < routes.num_experts[layer]
    weights = routes.weights[rows, layer, :slots].astype(np.float32)
    return ids, np.where(used, weights, np.float32(0)), used


def margins(weights: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return each token's largest weight minus its second, [n]; NaN for fewer than two or unrecorded ones."""
    if weights.shape[1] < 2:
        return np.full(len(weights), np.nan, np.float32)
    highest = np.sort(np.where(used, weights, -np.inf), axis=1)  # sorts NaN last
    second = np.where(used.sum(axis=1) >= 2, highest[:, -2], np.nan)
    return (highest[:, -1] - second).astype(np.float32)


def _last(weights: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return each token's smallest weight over the sum of its weights, [n]."""
    smallest = np.where(used, weights, np.inf).min(axis=1)
    return ratio(smallest, weights.sum(axis=1)).astype(np.float32)


def _quantiles(values: np.ndarray) -> Floats:
    return np.quantile(values, QUANTILES).astype(np.float64) if len(values) else np.full(5, np.nan)
