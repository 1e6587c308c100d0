"""`compare_routes`: the figures of `moe-trace routes diff`.

Of a token in a layer, with the sets A and B of its experts under the two routings:

- overlap: |A ∩ B| / max(|A|, |B|), the latter k where no slot was skipped; its mean over tokens is the router
  saturation of OLMoE (arXiv 2409.02060, section 5.1) where B is the last checkpoint.
- same rank: ranks at which both have the same expert, over the same.
- differs: A ≠ B. Reordered: A = B in another order.
- weights L1: the sum over experts of |weight in A - weight in B|, 0 where it was not chosen.
- margin: the largest weight minus the second largest, in A.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes
from moe_trace.read.routes.compare.align import Alignment, align
from moe_trace.read.routes.compare.weights import recorded_margins, weight_distance
from moe_trace.read.routes.overlap import compare_piece

_PIECE = 1 << 16
Figures = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class PositionOverlap:
    """Of tokens at some positions of their sequence: 0, 1, 2 to 3, 4 to 7, and so on."""

    first: int
    last: int
    tokens: int
    overlap: Figures
    """[L]"""
    differing: float
    """Share of the tokens whose experts differ in any layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutesComparison:
    """Two routings A and B of the same tokens; NaN where no token could be compared."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: int
    aligned_by: str
    only_a: int
    """Tokens without a counterpart in B."""
    only_b: int
    compared: npt.NDArray[np.int64]
    """[L] tokens with an expert in either."""
    overlap: Figures
    """[L] mean over tokens; uniform routing gives k / E."""
    same_rank: Figures
    """[L] mean over tokens."""
    differs: Figures
    """[L] share of tokens."""
    reordered: Figures
    """[L] share of tokens."""
    begins: Figures
    """[L] share of all tokens whose experts differ in this layer and in none before."""
    differing: float
    """Share of all tokens whose experts differ in any layer."""
    identical: float
    """Share of all tokens with the same experts at the same ranks in all layers."""
    positions: tuple[PositionOverlap, ...]
    """Empty where positions are unknown."""
    weights_l1: Figures | None
    """[L] mean over tokens; None where the weights of a side are not recorded."""
    margin_differing: Figures | None
    """[L] mean margin of the tokens that differ; None where A has no weights."""
    margin_same: Figures | None
    """[L] of the others."""

    @property
    def drift_begins(self) -> int | None:
        """The first layer in which any token's experts differ; None where none differ."""
        found = np.flatnonzero(self.begins > 0)
        return int(found[0]) if len(found) else None


class _Sums:
    """Sums over tokens of L layers and P classes of positions."""

    def __init__(self, layers: int, classes: int) -> None:
        self.compared = np.zeros(layers, np.int64)
        self.overlap, self.same_rank = np.zeros(layers), np.zeros(layers)
        self.differs, self.reordered = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
        self.begins = np.zeros(layers, np.int64)
        self.identical = 0
        self.class_tokens, self.class_differing = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        self.class_overlap, self.class_compared = np.zeros((2, classes, layers))
        self.l1 = np.zeros((2, layers))
        self.margins = np.zeros((2, 2, layers))
        """Of tokens that do not differ, and that do: sum, number."""


def compare_routes(a: RecordedRoutes, b: RecordedRoutes) -> RoutesComparison:
    """Compare two routings of the same tokens, of their first group of layers.

    Padding and recomputed tokens are left out.

    Raises:
        UsageError: the tokens or layers are not the same.
    """
    aligned = align(a, b)
    position = a.position[aligned.rows_a]
    classes = np.frexp(np.maximum(position, 0).astype(np.float64))[1]
    told = bool((position != UNKNOWN).all())
    sums = _Sums(len(aligned.layers), int(classes.max(initial=0)) + 1)
    for start in range(0, len(position), _PIECE):
        piece = slice(start, start + _PIECE)
        _add(sums, a, aligned.rows_a[piece], b, aligned.rows_b[piece], aligned, classes[piece])
    return _comparison(a, b, aligned, sums, position, told)


def _add(
    sums: _Sums,
    a: RecordedRoutes,
    rows_a: np.ndarray,
    b: RecordedRoutes,
    rows_b: np.ndarray,
    aligned: Alignment,
    classes: np.ndarray,
) -> None:
    began, identical = np.zeros(len(rows_a), np.bool_), np.ones(len(rows_a), np.bool_)
    for place, layers in enumerate(aligned.layers):
        piece = compare_piece(a, rows_a, b, rows_b, layers)
        differs = piece.compared & (piece.overlap < 1)
        moved = piece.compared & (piece.same_rank < 1)
        sums.compared[place] += piece.compared.sum()
        sums.overlap[place] += piece.overlap.sum()
        sums.same_rank[place] += piece.same_rank.sum()
        sums.differs[place] += differs.sum()
        sums.reordered[place] += (moved & ~differs).sum()
        sums.begins[place] += (differs & ~began).sum()
        began |= differs
        identical &= ~moved
        size = len(sums.class_tokens)
        sums.class_overlap[:, place] += np.bincount(classes, piece.overlap, size)
        sums.class_compared[:, place] += np.bincount(classes, piece.compared, size)
        if a.weights is not None:
            _add_weights(sums, place, recorded_margins(a, rows_a, layers[0]), differs, piece.compared)
            if b.weights is not None:
                distance = weight_distance(a, rows_a, b, rows_b, layers)
                counted = piece.compared & np.isfinite(distance)
                sums.l1[:, place] += distance[counted].sum(dtype=np.float64), counted.sum()
    sums.identical += int(identical.sum())
    sums.class_tokens += np.bincount(classes, minlength=len(sums.class_tokens))
    sums.class_differing += np.bincount(classes[began], minlength=len(sums.class_tokens))


def _add_weights(
    sums: _Sums, place: int, margin: np.ndarray, differs: np.ndarray, compared: np.ndarray
) -> None:
    for which, chosen in enumerate((compared & ~differs, differs)):
        values = margin[chosen & np.isfinite(margin)]
        sums.margins[which, :, place] += values.sum(dtype=np.float64), len(values)


def _comparison(
    a: RecordedRoutes, b: RecordedRoutes, aligned: Alignment, sums: _Sums, position: np.ndarray, told: bool
) -> RoutesComparison:
    tokens = len(position)
    with np.errstate(invalid="ignore", divide="ignore"):
        positions = tuple(
            PositionOverlap(
                first=(1 << place) >> 1,
                last=min((1 << place) - 1, int(position.max())),
                tokens=int(sums.class_tokens[place]),
                overlap=sums.class_overlap[place] / sums.class_compared[place],
                differing=float(sums.class_differing[place] / sums.class_tokens[place]),
            )
            for place in range(len(sums.class_tokens))
            if told and sums.class_tokens[place]
        )
        own = [one for one, _ in aligned.layers]
        weighed = a.weights is not None
        return RoutesComparison(
            layers=tuple(a.layers[layer] for layer in own),
            num_experts=tuple(a.num_experts[layer] for layer in own),
            top_k=tuple(a.top_k[layer] for layer in own),
            tokens=tokens,
            aligned_by=aligned.by,
            only_a=aligned.only_a,
            only_b=aligned.only_b,
            compared=sums.compared,
            overlap=sums.overlap / sums.compared,
            same_rank=sums.same_rank / sums.compared,
            differs=sums.differs / sums.compared,
            reordered=sums.reordered / sums.compared,
            begins=sums.begins / tokens,
            differing=float(sums.begins.sum() / tokens),
            identical=sums.identical / tokens,
            positions=positions,
            weights_l1=sums.l1[0] / sums.l1[1] if weighed and b.weights is not None else None,
            margin_same=sums.margins[0, 0] / sums.margins[0, 1] if weighed else None,
            margin_differing=sums.margins[1, 0] / sums.margins[1, 1] if weighed else None,
        )
