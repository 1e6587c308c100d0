"""Co-activation: which experts the router chooses together.

    P(j | i) = N_ij / N_i

N_ij are the tokens with both i and j in the top k, N_i those with i (OLMoE, arXiv 2409.02060, section 5.2).
All k (k - 1) / 2 pairs of a token count; the authors' script counts pairs of neighbouring ranks alone, 7 of
28 for k = 8, which `pairs="adjacent"` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.read.routes.tokens import LayerTokens

_CODES = 1 << 16
Pairs = Literal["all", "adjacent"]


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Of one layer."""

    together: npt.NDArray[np.int64]
    """[E, E] tokens with both experts, symmetric, 0 on the diagonal."""
    counts: npt.NDArray[np.int64]
    """[E] tokens with the expert."""

    @property
    def probability(self) -> npt.NDArray[np.float64]:
        """[E, E] P(j | i) in row i and column j; NaN in rows of experts that no token chose."""
        return ratio(self.together, self.counts[:, None])

    def strongest(self, pairs: int = 5) -> list[tuple[int, int, float]]:
        """Pairs (i, j, P(j | i)) by falling P, at most one per i and j."""
        values = np.nan_to_num(self.probability)
        values = np.where(values >= values.T, values, 0)
        flat = np.argsort(-values, axis=None, kind="stable")
        found: dict[frozenset[int], tuple[int, int, float]] = {}
        for i, j in zip(*np.unravel_index(flat[: 4 * pairs], values.shape), strict=True):
            if values[i, j] > 0 and len(found) < pairs:
                found.setdefault(frozenset((int(i), int(j))), (int(i), int(j), float(values[i, j])))
        return list(found.values())


def coactivation(tokens: LayerTokens, pairs: Pairs = "all") -> Coactivation:
    """Count the pairs of every token."""
    side = tokens.experts + 1
    together = np.zeros(side * side, np.int64)
    slots = tokens.ids.shape[1]
    first, second = (
        np.triu_indices(slots, 1) if pairs == "all" else (np.arange(slots - 1), np.arange(1, slots))
    )
    for ids_Kn in tokens.chunks(tokens_at_once(side * side, len(first))):
        together += np.bincount((ids_Kn[first] * side + ids_Kn[second]).ravel(), minlength=side * side)
    square = together.reshape(side, side)[:-1, :-1]
    square = square + square.T
    np.fill_diagonal(square, 0)
    return Coactivation(square, tokens.counts)


def tokens_at_once(bins: int, pairs: int) -> int:
    """Tokens to count pairs of at a time: their codes stay in a core's cache, and outnumber the bins."""
    return max(_CODES, 2 * bins) // max(1, pairs) + 1


def ratio(part: np.ndarray, whole: np.ndarray) -> npt.NDArray[np.float64]:
    """part / whole, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
