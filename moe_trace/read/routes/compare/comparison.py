"""`compare_routes`: the metrics of `moe-trace routes diff`.

For a token in a layer, with the sets A and B of its experts under the two routings:

- overlap: |A ∩ B| / max(|A|, |B|), where the latter is k unless a slot was skipped; its mean over tokens is
  the router saturation of OLMoE (arXiv 2409.02060, section 5.1) if B is the last checkpoint.
- same rank: number of ranks with the same expert in both, over the same.
- differs: A ≠ B. Reordered: A = B in another order.
- weights L1: the sum over experts of |weight in A - weight in B|, where experts not chosen have weight 0.
- margin: the largest weight minus the second largest, in A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_trace.data.display.json import attributes
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes
from moe_trace.read.routes.compare.align import align
from moe_trace.read.routes.expert_pairs import ratio
from moe_trace.read.routes.gates import chosen_weights, margins
from moe_trace.read.routes.saturation import LayerOverlap, compare_layer
from moe_trace.read.routes.sets import Floats, Ints

_CHUNK_ROWS = 1 << 14


@dataclass(frozen=True, eq=False, kw_only=True)
class PositionOverlap:
    """Overlap of tokens in a range of positions of their sequence: 0, 1, 2 to 3, 4 to 7, and so on."""

    first: int
    last: int
    tokens: int
    overlap: Floats
    """[L] mean overlap."""
    differing: float
    """Share of the tokens whose experts differ in any layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutesComparison:
    """Comparison of two routings A and B of the same tokens; NaN where no token could be compared."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: int
    aligned_by: str
    only_a: int
    """Number of tokens without a counterpart in B."""
    only_b: int
    compared: Ints
    """[L] number of tokens with an expert in either."""
    overlap: Floats
    """[L] mean over tokens; uniform routing gives k / E."""
    same_rank: Floats
    """[L] mean over tokens."""
    differs: Floats
    """[L] share of tokens."""
    reordered: Floats
    """[L] share of tokens."""
    begins: Floats
    """[L] share of all tokens whose experts differ in this layer and in none before."""
    differing: float
    """Share of all tokens whose experts differ in any layer."""
    identical: float
    """Share of all tokens with the same experts at the same ranks in all layers."""
    positions: tuple[PositionOverlap, ...]
    """Overlap by position; empty if positions are unknown."""
    weights_l1: Floats | None
    """[L] mean over tokens; None if the weights of a side are not recorded."""
    margin_differing: Floats | None
    """[L] mean margin of the tokens that differ; None if A has no weights."""
    margin_same: Floats | None
    """[L] mean margin of the other tokens."""

    @property
    def drift_begins(self) -> int | None:
        """Index of the first layer in which any token's experts differ, or None if none differ."""
        found = np.flatnonzero(self.begins > 0)
        return int(found[0]) if len(found) else None


def compare_routes(a: RecordedRoutes, b: RecordedRoutes) -> RoutesComparison:
    """Compare two routings of the same tokens in their first groups of layers, without padding.

    Raises:
        UsageError: The tokens or layers are not the same.
    """
    aligned = align(a, b)
    rows_a, rows_b, position_N = aligned.rows_a, aligned.rows_b, a.position[aligned.rows_a]
    differ_N, same_N = np.zeros(len(rows_a), np.bool_), np.ones(len(rows_a), np.bool_)
    rows: list[dict[str, Any]] = []
    for layers in aligned.layers:
        found = compare_layer(a, rows_a, b, rows_b, layers)
        differs_N, moved_N = found.compared & (found.overlap < 1), found.compared & (found.same_rank < 1)
        rows.append(
            {
                "compared": found.compared.sum(),
                "overlap": _mean(found.overlap, found.compared),
                "same_rank": _mean(found.same_rank, found.compared),
                "differs": _mean(differs_N, found.compared),
                "reordered": _mean(moved_N & ~differs_N, found.compared),
                "by_position": _by_position(position_N, found),
                "begins": (differs_N & ~differ_N).mean(),
                **_compare_weights(a, rows_a, b, rows_b, layers, differs_N, found.compared),
            }
        )
        differ_N |= differs_N
        same_N &= ~moved_N
    figures: dict[str, Any] = {
        name: None if one is None else np.array([row[name] for row in rows]) for name, one in rows[0].items()
    }
    for name in ("layers", "num_experts", "top_k"):
        figures[name] = tuple(getattr(a, name)[layer] for layer, _ in aligned.layers)
    return RoutesComparison(
        **attributes(aligned, "aligned_by", "only_a", "only_b"),
        tokens=len(rows_a),
        differing=float(differ_N.mean()),
        identical=float(same_N.mean()),
        positions=_positions(position_N, differ_N, figures.pop("by_position")),
        **figures,
    )


def _classes(position_N: np.ndarray) -> np.ndarray:
    """Return the class of each position, [N]: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    exponents: np.ndarray = np.frexp(np.maximum(position_N, 0).astype(np.float64))[1]
    return exponents


def _by_position(position_N: np.ndarray, found: LayerOverlap) -> Floats:
    """Return the mean overlap of the tokens of each class of positions, [P]."""
    class_N = _classes(position_N)
    return ratio(np.bincount(class_N, found.overlap), np.bincount(class_N, found.compared))


def _positions(
    position_N: np.ndarray, differ_N: np.ndarray, overlap_LP: Floats
) -> tuple[PositionOverlap, ...]:
    if (position_N == UNKNOWN).any():
        return ()
    class_N = _classes(position_N)
    return tuple(
        PositionOverlap(
            first=(1 << place) >> 1,
            last=min((1 << place) - 1, int(position_N.max())),
            tokens=int((class_N == place).sum()),
            overlap=overlap_LP[:, place],
            differing=float(differ_N[class_N == place].mean()),
        )
        for place in np.unique(class_N).tolist()
    )


def _compare_weights(
    a: RecordedRoutes,
    rows_a: np.ndarray,
    b: RecordedRoutes,
    rows_b: np.ndarray,
    layers: tuple[int, int],
    differs_N: np.ndarray,
    compared_N: np.ndarray,
) -> dict[str, float | None]:
    if a.weights is None:
        return dict.fromkeys(("weights_l1", "margin_differing", "margin_same"))
    margin_N = margins(*chosen_weights(a, rows_a, layers[0])[1:])
    distance_N = None
    if b.weights is not None:
        distance_N = np.empty(len(rows_a))
        for start in range(0, len(rows_a), _CHUNK_ROWS):
            piece = slice(start, start + _CHUNK_ROWS)
            apart_NE = _by_expert(a, rows_a[piece], layers[0]) - _by_expert(b, rows_b[piece], layers[1])
            distance_N[piece] = np.abs(apart_NE).sum(axis=1)
    return {
        "weights_l1": None if distance_N is None else _mean(distance_N, compared_N),
        "margin_differing": _mean(margin_N, differs_N),
        "margin_same": _mean(margin_N, compared_N & ~differs_N),
    }


def _by_expert(routes: RecordedRoutes, rows: np.ndarray, layer: int) -> np.ndarray:
    """Return weights by expert, [n, E + 1], with 0 for experts not chosen and NaN where unrecorded."""
    ids, weights, _ = chosen_weights(routes, rows, layer)
    experts = routes.num_experts[layer]
    by_expert = np.zeros((len(rows), experts + 1), np.float32)
    np.put_along_axis(by_expert, np.minimum(ids, experts).astype(np.int64), weights, axis=1)
    return by_expert


def _mean(values_N: np.ndarray, chosen_N: np.ndarray) -> float:
    known = values_N[chosen_N & np.isfinite(values_N)]
    return float(known.mean(dtype=np.float64)) if len(known) else float("nan")
