"""Pairs of experts that a token chooses together in one layer (co-activation) or in consecutive layers.

    P(j | i) = N_ij / N_i                     co-activation
    P(e' | e) = N_ee' / N_e                  transition

N_ij counts the tokens with both i and j in the top k, N_i those with i (OLMoE, arXiv 2409.02060, section
5.2). All k (k - 1) / 2 pairs of a token count; the authors' script counts only pairs of neighbouring ranks, 7
of 28 for k = 8, as `pairs="adjacent"` does. N_ee' counts the tokens with e in layer l and e' in the next one.

How well l predicts l + 1 is measured on held-out tokens: the table is counted on the first half of the tokens
(sequence after sequence) and evaluated on the second. The prediction is the k' experts with the largest sum
of P(e' | e) over the token's experts e; the baseline is the k' most used experts of the first half. Recall is
the number of predicted experts that were used, over all that were used. Ties go to the lower id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_trace.read.routes.sets import Floats, Ints, expert_sets, total_size
from moe_trace.read.routes.tokens import LayerTokens, of_same_tokens

_CODES = 1 << 16
Pairs = Literal["all", "adjacent"]


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Co-activation in one layer."""

    together: Ints
    """[E, E] number of tokens with both experts, symmetric, 0 on the diagonal."""
    counts: Ints
    """[E] number of tokens with the expert."""

    @property
    def probability(self) -> Floats:
        """P(j | i) in row i and column j, [E, E]; NaN in rows of experts that no token chose."""
        return ratio(self.together, self.counts[:, None])

    def strongest(self, pairs: int = 5) -> list[tuple[int, int, float]]:
        """Return pairs (i, j, P(j | i)) by decreasing P, with at most one per i and j."""
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
    width = tokens.experts + 1
    pair_counts = np.zeros(width * width, np.int64)
    slots = tokens.ids.shape[1]
    first, second = (
        np.triu_indices(slots, 1) if pairs == "all" else (np.arange(slots - 1), np.arange(1, slots))
    )
    for ids_Kn in tokens.chunks(tokens_at_once(width * width, len(first))):
        pair_counts += np.bincount((ids_Kn[first] * width + ids_Kn[second]).ravel(), minlength=width * width)
    square = pair_counts.reshape(width, width)[:-1, :-1]
    square = square + square.T
    np.fill_diagonal(square, 0)
    return Coactivation(square, tokens.counts)


def tokens_at_once(bins: int, pairs: int) -> int:
    """Return how many tokens to count at a time: their codes fit a core's cache and outnumber the bins."""
    return max(_CODES, 2 * bins) // max(1, pairs) + 1


def ratio(part: np.ndarray, whole: np.ndarray) -> Floats:
    """Return part / whole, or NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


TOKENS_ASKED = 1 << 14
"""Maximum number of held-out tokens to predict, evenly spaced."""


@dataclass(frozen=True, eq=False)
class Transition:
    """Transition from one layer to the next."""

    counts: Ints
    """[E, E'] number of tokens with expert e here and e' in the next layer."""
    used: Ints
    """[E] number of tokens with e here."""
    recall: float
    """Share of held-out tokens' next-layer experts that this layer predicts; NaN with too few tokens."""
    recall_by_load: float
    """The same if the most used experts of the next layer are predicted."""
    tokens_asked: int
    """Number of held-out tokens that were predicted."""

    @property
    def probability(self) -> Floats:
        """P(e' | e), [E, E']; NaN in rows of experts that no token chose."""
        return ratio(self.counts, self.used[:, None])


def transition(here: LayerTokens, after: LayerTokens) -> Transition:
    """Count transitions, and evaluate predictions of the second half from the first."""
    here, after = of_same_tokens(here, after)
    middle = len(here) // 2
    halves = [slice(0, middle), slice(middle, None)]
    first, second = (pair_counts(here.ids[h], after.ids[h], here.experts, after.experts) for h in halves)
    used_E, used_next_E = (_counts(t.ids[:middle], t.experts) for t in (here, after))
    tested = middle + np.unique(np.linspace(0, len(here) - middle - 1, TOKENS_ASKED).astype(np.int64))
    tested = tested[tested < len(here)] if middle else tested[:0]
    slots = min(after.ids.shape[1], after.experts)
    guesses = predict(np.nan_to_num(ratio(first, used_E[:, None])), here.ids[tested], slots)
    by_load = np.tile(_top_ids(used_next_E[None].astype(np.float64), slots), (len(tested), 1))
    actual = expert_sets(after.ids[tested], after.experts)
    hits = [total_size(expert_sets(g, after.experts) & actual) for g in (guesses, by_load)]
    total = total_size(actual)
    return Transition(
        counts=first + second,
        used=here.counts,
        recall=hits[0] / total if total else float("nan"),
        recall_by_load=hits[1] / total if total else float("nan"),
        tokens_asked=len(tested),
    )


def pair_counts(here_NK: np.ndarray, after_NK: np.ndarray, experts: int, experts_after: int) -> Ints:
    """Count tokens with e in one layer and e' in another, [E, E']; ids from `experts` on are no expert."""
    width = experts_after + 1
    bins = (experts + 1) * width
    counts = np.zeros(bins, np.int64)
    at_once = tokens_at_once(bins, here_NK.shape[1] * after_NK.shape[1])
    for start in range(0, len(here_NK), at_once):
        here_Kn = np.ascontiguousarray(here_NK[start : start + at_once].T, np.int64) * width
        after_Kn = np.ascontiguousarray(after_NK[start : start + at_once].T, np.int64)
        counts += np.bincount((here_Kn[:, None] + after_Kn).ravel(), minlength=bins)
    return counts.reshape(-1, width)[:experts, :experts_after]


def predict(probability: Floats, ids_NK: np.ndarray, slots: int) -> np.ndarray:
    """Return the experts with the largest sum of `probability` [E, E'] over each row's, [N, slots]."""
    padded = np.concatenate([probability, np.zeros((1, probability.shape[1]))])
    guesses = np.empty((len(ids_NK), slots), np.uint16)
    for start in range(0, len(ids_NK), 1 << 12):
        ids = ids_NK[start : start + (1 << 12)]
        scores = sum((padded[ids_N] for ids_N in ids.T), np.zeros((len(ids), probability.shape[1])))
        guesses[start : start + len(ids)] = _top_ids(scores, slots)
    return guesses


def _top_ids(scores_NE: Floats, slots: int) -> np.ndarray:
    return np.argsort(-scores_NE, axis=1, kind="stable")[:, :slots].astype(np.uint16)


def _counts(ids_NK: np.ndarray, experts: int) -> Ints:
    return np.bincount(ids_NK.ravel(), minlength=experts + 1)[:experts]
