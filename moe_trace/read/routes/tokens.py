"""Select the rows that count, chain the tokens of a sequence, and extract the experts of one layer.

Padding and recomputed rows are excluded. A token follows another if the next row of the same sequence number,
in the order of the calls, is one position further; a chain of such tokens is a run. If sequence or position
is unknown, a token follows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.sets import Ints, Mask, Words, expert_sets

CHUNK = 1 << 12
"""Number of tokens processed at a time, which fit a core's cache."""


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """The N rows that count, sequence after sequence; those of unknown order last."""

    rows: Ints
    """[N] row numbers."""
    follows: Mask
    """[N] whether the token follows the one before it."""
    known: Mask
    """[N] whether its sequence and position were recorded."""

    @classmethod
    def of(cls, routes: RecordedRoutes) -> TokenOrder:
        """Order the tokens of one group of layers."""
        known = (routes.sequence >= 0) & (routes.position >= 0)
        sequence = np.where(known, routes.sequence.astype(np.int64), np.iinfo(np.int64).max)
        rows = np.flatnonzero(routes.counted)
        rows = rows[np.argsort(sequence[rows], kind="stable")]
        follows = np.zeros(len(rows), np.bool_)
        sequence, position, known = sequence[rows], routes.position[rows], known[rows]
        follows[1:] = (sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1] + 1) & known[1:]
        return cls(rows, follows, known)

    def only(self, kept: Mask) -> TokenOrder:
        """Restrict to some tokens; those after a removed token follow nothing."""
        after_kept = np.concatenate([[False], kept[:-1]])
        return TokenOrder(self.rows[kept], (self.follows & after_kept)[kept], self.known[kept])

    @cached_property
    def place(self) -> Ints:
        """[N] number of tokens before it in its run."""
        at_N = np.arange(len(self.rows))
        return at_N - np.maximum.accumulate(np.where(self.follows, 0, at_N))


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """Experts of the tokens in one layer, without tokens whose call in it was lost."""

    ids: np.ndarray
    """[N, K] uint8 or uint16 in the router's order; `experts` where there is none."""
    experts: int
    order: TokenOrder

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sets(self) -> Words:
        """[N, W] experts of each token as bits."""
        return expert_sets(self.ids, self.experts)

    @cached_property
    def counts(self) -> Ints:
        """[E] number of slots assigned to each expert."""
        width = self.experts + 1
        parts = (np.bincount(ids_Kn.ravel(), minlength=width) for ids_Kn in self.chunks())
        return sum(parts, np.zeros(width, np.int64))[: self.experts]

    @property
    def assignments(self) -> int:
        """Number of slots assigned to an expert."""
        return int(self.counts.sum())

    def chunks(self, size: int = CHUNK) -> Iterator[Ints]:
        """Yield ids of consecutive tokens, [K, n], `size` tokens at a time."""
        for start in range(0, len(self.ids), size):
            yield np.ascontiguousarray(self.ids[start : start + size].T, np.int64)


def layer_tokens(routes: RecordedRoutes, order: TokenOrder, layer: int) -> LayerTokens:
    """Extract the experts in layer number `layer` of the tokens in `order`."""
    if routes.lost_layers is not None:
        lost = routes.lost_layers[order.rows, layer]
        order = order.only(~lost) if lost.any() else order
    experts, slots = routes.num_experts[layer], routes.top_k[layer]
    ids_NK = routes.expert_ids[order.rows, layer, :slots]
    return LayerTokens(np.minimum(ids_NK, ids_NK.dtype.type(experts), out=ids_NK), experts, order)


def of_same_tokens(first: LayerTokens, second: LayerTokens) -> tuple[LayerTokens, LayerTokens]:
    """Restrict both to the tokens that were lost in neither."""
    if len(first) == len(second) and np.array_equal(first.order.rows, second.order.rows):
        return first, second
    pair = []
    for own, other in ((first, second), (second, first)):
        kept = np.isin(own.order.rows, other.order.rows)
        pair.append(replace(own, ids=own.ids[kept], order=own.order.only(kept)))
    return pair[0], pair[1]
