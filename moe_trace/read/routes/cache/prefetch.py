"""Prefetching by transition: while layer l runs, load what its experts predict for layer l + 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.read.routes.cache.requests import Requests
from moe_trace.read.routes.cache.stack import StackPolicy, places
from moe_trace.read.routes.expert_pairs import ratio
from moe_trace.read.routes.sets import Words, expert_sets, members

_ROWS = 1 << 13


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefetch:
    """Effect of prefetching over the second half of the steps, with predictions learned from the first half.

    The k experts of the next layer with the largest sum of P(e' | e) over the experts e that the step needs
    in this layer are loaded in addition to the memory's experts, unless they are among them. Used or not,
    they do not change what the policy keeps. Nothing can be predicted for the first layer.
    """

    requests: int
    """Number of experts that these steps needed, in all layers together."""
    hits: int
    """Number of requests in memory without prefetching."""
    hidden: int
    """Number of requests not in memory, but loaded ahead, whose loading is hidden."""
    loaded_ahead: int
    """Number of experts loaded ahead; `hidden` of them were needed, the others were moved in vain."""

    @property
    def hit_rate(self) -> float:
        """Share of requests that were in memory or loaded ahead."""
        return (self.hits + self.hidden) / self.requests if self.requests else float("nan")

    @property
    def hit_rate_without(self) -> float:
        """Share of the same requests that hit without prefetching."""
        return self.hits / self.requests if self.requests else float("nan")

    @property
    def precision(self) -> float:
        """Share of the experts loaded ahead that were needed."""
        return self.hidden / self.loaded_ahead if self.loaded_ahead else float("nan")


def prefetch(
    policy: StackPolicy, needed: Requests, top_k: Sequence[int], memory_sizes: Sequence[int]
) -> list[Prefetch]:
    """Evaluate prefetching for each memory size."""
    half = needed.steps // 2
    totals = np.zeros((len(memory_sizes), 4), np.int64)
    for layer, sets in enumerate(needed.sets):
        ahead = np.zeros_like(sets)
        if layer:
            ahead[half:] = predicted(needed, layer - 1, half, top_k[layer])
        for column, asked in enumerate((sets, sets & ahead, ahead)):
            for steps, _, found in places(policy, sets, asked):
                judged = found[steps >= half]
                hits_by_size = np.array(
                    [(judged < min(size, 64 * sets.shape[1])).sum() for size in memory_sizes]
                )
                totals[:, column] += hits_by_size if column == 0 else len(judged) - hits_by_size
                totals[:, 3] += len(judged) if column == 0 else 0
    return [
        Prefetch(requests=int(r), hits=int(hits), hidden=int(hidden), loaded_ahead=int(loaded))
        for hits, hidden, loaded, r in totals
    ]


def predicted(needed: Requests, layer: int, half: int, slots: int) -> Words:
    """Predict layer + 1 for the second half of the steps, [S - half, W], from the counts of the first."""
    sets, next_sets = needed.sets[layer], needed.sets[layer + 1]
    experts, experts_after = needed.experts[layer], needed.experts[layer + 1]
    counts = np.zeros((experts, experts_after))
    for start in range(0, half, _ROWS):
        rows = slice(start, min(start + _ROWS, half))
        pair_counts = members(sets[rows], experts).T.astype(np.float32) @ members(
            next_sets[rows], experts_after
        )
        counts += pair_counts
    used_E = members(sets[:half], experts).sum(axis=0)
    probability = np.nan_to_num(ratio(counts, used_E[:, None]))
    found = [next_sets[:0]]
    for start in range(half, len(sets), _ROWS):
        scores = members(sets[start : start + _ROWS], experts) @ probability
        best = np.argsort(-scores, axis=1, kind="stable")[:, : min(slots, experts_after)]
        found.append(expert_sets(best.astype(np.uint16), experts_after))
    return np.concatenate(found)
