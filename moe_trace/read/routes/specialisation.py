"""Specialisation of experts in domains and in words (OLMoE, arXiv 2409.02060, sections 5.3 and 5.4).

- domain: share of a domain's tokens that have the expert in their top k; uniform routing gives k / E.
- vocabulary: for a token id x that occurs N_x times, N_xe of them with expert e,

      specialisation(x) = max_e N_xe / N_x,      of a layer: the mean over ids

  once with e anywhere in the top k, once with e in the first slot alone, as the authors' script counts. 1
  means that every id has an expert of its own. Ids that occur once have 1 trivially, so the mean over ids
  with `OFTEN` occurrences or more is also given. The ids are those of the input tokens (`input`), of the
  next token of the same run (`target`), or of the model's predictions (`predicted`) if given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.read.routes.expert_pairs import ratio
from moe_trace.read.routes.sets import Floats, Ints, Mask
from moe_trace.read.routes.tokens import LayerTokens

OFTEN = 10
"""Minimum number of occurrences of a frequent id, as in the authors' script."""
_BINS = 1 << 19


@dataclass(frozen=True, eq=False)
class Domains:
    """Specialisation in domains of one layer."""

    tokens: Ints
    """[D] number of tokens of each domain."""
    share: Floats
    """[D, E] share of a domain's tokens with the expert in their top k; NaN for a domain without tokens."""
    uniform: float
    """Value for uniform routing, k / E."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Specialisation in token ids of one layer, for one kind of ids."""

    ids: int
    """Number of different ids."""
    mean: float
    """Mean over ids of the largest share of their occurrences with one expert in the top k."""
    mean_often: float
    """The same over ids with `OFTEN` occurrences or more; NaN if there are none."""
    mean_first: float
    """Like `mean`, counting only the first slot."""
    by_expert: Floats
    """[E] mean over the frequent ids whose favourite expert of the top k it is; NaN if there are none."""
    favourites: Ints
    """[E] number of frequent ids whose favourite it is; ties go to the lower expert."""


def domains(tokens: LayerTokens, domain_N: Ints, number: int) -> Domains:
    """Compute the shares of one layer.

    Args:
        domain_N: Domain of each token, [N], out of `number`.
    """
    tokens_D = np.bincount(domain_N, minlength=number)
    width = tokens.experts + 1
    counts = np.zeros(number * width, np.int64)
    for ids_N in tokens.ids.T:
        counts += np.bincount(domain_N * width + ids_N, minlength=number * width)
    share = ratio(counts.reshape(number, width)[:, :-1], tokens_D[:, None])
    return Domains(tokens_D, share, tokens.ids.shape[1] / tokens.experts)


@dataclass(frozen=True, eq=False)
class IdOrder:
    """Tokens with a known id, sorted by id; created once and used for every layer."""

    tokens: Ints
    """[T] positions of the tokens, grouped by id."""
    number: Ints
    """[T] number of the id, counted from 0."""

    @classmethod
    def of(cls, ids_N: np.ndarray) -> IdOrder:
        """Sort tokens by id, [N]; negative ids are unknown."""
        known = np.flatnonzero(ids_N >= 0)
        tokens = known[np.argsort(ids_N[known], kind="stable")]
        return cls(tokens, _dense_ids(ids_N[tokens]))

    def only(self, kept_N: Mask) -> IdOrder:
        """Restrict to some of the tokens, which are renumbered."""
        kept = kept_N[self.tokens]
        return IdOrder((np.cumsum(kept_N) - 1)[self.tokens[kept]], _dense_ids(self.number[kept]))


def _dense_ids(sorted_ids: np.ndarray) -> Ints:
    return np.cumsum(np.diff(sorted_ids, prepend=sorted_ids[:1]) != 0)


def vocabulary(tokens: LayerTokens, order: IdOrder) -> Vocabulary | None:
    """Compute the specialisation of one layer, or return None if no token has an id."""
    experts = tokens.experts
    if not len(order.number):
        return None
    occurrences, best, favourite, first = _favourites(tokens, order)
    is_frequent = (occurrences >= OFTEN) & (best > 0)
    share = best / occurrences
    favourites = np.bincount(favourite[is_frequent], minlength=experts)
    return Vocabulary(
        ids=len(occurrences),
        mean=float(share.mean()),
        mean_often=float(share[occurrences >= OFTEN].mean())
        if (occurrences >= OFTEN).any()
        else float("nan"),
        mean_first=float((first / occurrences).mean()),
        by_expert=ratio(
            np.bincount(favourite[is_frequent], share[is_frequent], minlength=experts), favourites
        ),
        favourites=favourites,
    )


def _favourites(tokens: LayerTokens, order: IdOrder) -> Sequence[np.ndarray]:
    """Return per id occurrences, those with its favourite, that expert, and the most with one first slot."""
    width, number = tokens.experts + 1, order.number
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    occurrences = np.diff(starts, append=len(number))
    best, favourite, first = (np.zeros(len(starts), np.int64) for _ in range(3))
    at_once = max(1, _BINS // width)
    for low in range(0, len(starts), at_once):
        high = min(low + at_once, len(starts))
        part = slice(starts[low], starts[high] if high < len(starts) else len(number))
        base_n = (number[part] - low) * width
        ids_nK = tokens.ids.take(order.tokens[part], axis=0)
        counts = np.bincount((base_n[:, None] + ids_nK).ravel(), minlength=(high - low) * width)
        table = counts.reshape(-1, width)[:, :-1]
        favourite[low:high] = table.argmax(axis=1)
        best[low:high] = np.take_along_axis(table, favourite[low:high, None], axis=1)[:, 0]
        firsts = np.bincount(base_n + ids_nK[:, 0], minlength=(high - low) * width)
        first[low:high] = firsts.reshape(-1, width)[:, :-1].max(axis=1)
    return occurrences, best, favourite, first
