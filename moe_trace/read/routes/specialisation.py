"""Specialisation of experts in domains and in words (OLMoE, arXiv 2409.02060, sections 5.3 and 5.4).

- domain: share of a domain's tokens that have the expert in their top k; k / E is what uniform routing gives.
- vocabulary: for a token id x that occurs N_x times, N_xe of them with expert e,

      specialisation(x) = max_e N_xe / N_x,      of a layer: the mean over ids

  once with e anywhere in the top k, once with e in the first slot alone, as the authors' script counts. 1
  means that every id has an expert of its own; ids that occur once are 1 by themselves, so the mean over ids
  with `OFTEN` occurrences or more stands beside it. The ids are those of the tokens that went in (`input`),
  of the next token of the same run (`target`), or of what the model predicts (`predicted`), where given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.read.routes.expert_pairs import ratio
from moe_trace.read.routes.sets import Floats, Ints, Mask
from moe_trace.read.routes.tokens import LayerTokens

OFTEN = 10
"""Occurrences from which on an id counts as frequent, as in the authors' script."""
_BINS = 1 << 19


@dataclass(frozen=True, eq=False)
class Domains:
    """Of one layer."""

    tokens: Ints
    """[D] tokens of each domain."""
    share: Floats
    """[D, E] share of a domain's tokens with the expert in their top k; NaN for a domain without tokens."""
    uniform: float
    """k / E."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Of one layer and one kind of ids."""

    ids: int
    """Different ids."""
    mean: float
    """Mean over ids of the largest share of their occurrences that one expert of the top k got."""
    mean_often: float
    """The same over ids with `OFTEN` occurrences or more; NaN where there are none."""
    mean_first: float
    """As `mean`, counting the first slot alone."""
    by_expert: Floats
    """[E] mean over the frequent ids whose favourite expert of the top k it is; NaN where it is nobody's."""
    favourites: Ints
    """[E] number of frequent ids whose favourite it is; ties go to the lower expert."""


def domains(tokens: LayerTokens, domain_N: Ints, number: int) -> Domains:
    """Shares of one layer.

    Args:
        domain_N: [N] which of the `number` domains each token belongs to.
    """
    tokens_D = np.bincount(domain_N, minlength=number)
    side = tokens.experts + 1
    counts = np.zeros(number * side, np.int64)
    for ids_N in tokens.ids.T:
        counts += np.bincount(domain_N * side + ids_N, minlength=number * side)
    share = ratio(counts.reshape(number, side)[:, :-1], tokens_D[:, None])
    return Domains(tokens_D, share, tokens.ids.shape[1] / tokens.experts)


@dataclass(frozen=True, eq=False)
class IdOrder:
    """The tokens that have an id, id after id: made once, used by every layer."""

    tokens: Ints
    """[T] places of the tokens, of equal ids one after the other."""
    number: Ints
    """[T] which id it is, counted from 0."""

    @classmethod
    def of(cls, ids_N: np.ndarray) -> IdOrder:
        """Of N tokens' ids; negative ids are unknown."""
        known = np.flatnonzero(ids_N >= 0)
        tokens = known[np.argsort(ids_N[known], kind="stable")]
        return cls(tokens, _numbered(ids_N[tokens]))

    def only(self, kept_N: Mask) -> IdOrder:
        """Of some of the tokens, which are counted anew."""
        kept = kept_N[self.tokens]
        return IdOrder((np.cumsum(kept_N) - 1)[self.tokens[kept]], _numbered(self.number[kept]))


def _numbered(sorted_ids: np.ndarray) -> Ints:
    return np.cumsum(np.diff(sorted_ids, prepend=sorted_ids[:1]) != 0)


def vocabulary(tokens: LayerTokens, order: IdOrder) -> Vocabulary | None:
    """Of one layer; None where no token has an id."""
    experts = tokens.experts
    if not len(order.number):
        return None
    occurrences, best, favourite, first = _favourites(tokens, order)
    often = (occurrences >= OFTEN) & (best > 0)
    share = best / occurrences
    favourites = np.bincount(favourite[often], minlength=experts)
    return Vocabulary(
        ids=len(occurrences),
        mean=float(share.mean()),
        mean_often=float(share[occurrences >= OFTEN].mean())
        if (occurrences >= OFTEN).any()
        else float("nan"),
        mean_first=float((first / occurrences).mean()),
        by_expert=ratio(np.bincount(favourite[often], share[often], minlength=experts), favourites),
        favourites=favourites,
    )


def _favourites(tokens: LayerTokens, order: IdOrder) -> Sequence[np.ndarray]:
    """Of every id: occurrences, those with its favourite expert, that expert, those with its first slot's."""
    side, number = tokens.experts + 1, order.number
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    occurrences = np.diff(starts, append=len(number))
    best, favourite, first = (np.zeros(len(starts), np.int64) for _ in range(3))
    at_once = max(1, _BINS // side)
    for low in range(0, len(starts), at_once):
        high = min(low + at_once, len(starts))
        part = slice(starts[low], starts[high] if high < len(starts) else len(number))
        base_n = (number[part] - low) * side
        ids_nK = tokens.ids.take(order.tokens[part], axis=0)
        counts = np.bincount((base_n[:, None] + ids_nK).ravel(), minlength=(high - low) * side)
        table = counts.reshape(-1, side)[:, :-1]
        favourite[low:high] = table.argmax(axis=1)
        best[low:high] = np.take_along_axis(table, favourite[low:high, None], axis=1)[:, 0]
        firsts = np.bincount(base_n + ids_nK[:, 0], minlength=(high - low) * side)
        first[low:high] = firsts.reshape(-1, side)[:, :-1].max(axis=1)
    return occurrences, best, favourite, first
