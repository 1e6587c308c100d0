"""Compare the routing of two recordings: per layer, the distance of the experts' shares and its chance level.

The distance is the total variation, half the sum of absolute differences of shares: the part of the
assignments that would have to move to make the distributions equal. Its chance level comes from a permutation
test: the steps of both sides are randomly reassigned to A and B, identically in all layers, and a layer
differs if its distance, in standard deviations of its own permutations, exceeds the largest of all layers in
99 % of the permutations (Westfall and Young 1993: of a hundred comparisons of the same thing, one names a
layer).

With too few steps to permute, assignments are drawn from the pooled shares of both sides as if tokens were
independent. Tokens of one text are not: `TOKENS_ALIKE` of them count as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.load_stats import TOKENS_ALIKE
from moe_trace.read.diff.metrics import Side, counts_by_unit
from moe_trace.read.diff.resampling import Floats

LEVEL = 0.99
PERMUTATIONS = 999
_SPLITS_MIN = 200  # with fewer ways to split the steps, no distance could reach the level
_EXPERTS_NAMED = 3
Shared = tuple[str, str, str]
"""A router in both recordings: its label, its module path in A, and its module path in B."""


@dataclass(frozen=True, kw_only=True)
class ExpertShift:
    """One expert's share of its layer's assignments in A and in B."""

    expert: int
    share_a: float
    share_b: float


@dataclass(frozen=True, kw_only=True)
class RoutingChange:
    """Comparison of one layer's distributions over experts."""

    site: str
    stage: str
    total_variation: float
    """Distance from 0 (the same shares) to 1 (no expert in common)."""
    chance: float
    """Distance that chance alone does not exceed in 99 of 100 comparisons of the same thing."""
    chance_from: Literal["steps", "tokens"]
    """Whether steps were permuted, or tokens were drawn as if independent."""
    changed: bool
    gained: tuple[ExpertShift, ...]
    """Experts that gained most, largest gain first."""
    lost: tuple[ExpertShift, ...]
    same_counts: bool
    """Whether every call of B assigned as many tokens to each expert as the same call of A."""


def compare_routing(a: Side, b: Side, routers: Sequence[Shared], stage: str) -> tuple[RoutingChange, ...]:
    """Compare the routing of each router with assignments on both sides."""
    compared, tables = [], []
    for router in routers:
        counts = [counts_by_unit(side, side.rows(n)) for side, n in zip((a, b), router[1:], strict=True)]
        if counts[0].shape[1] == counts[1].shape[1] and all(c.any() for c in counts):
            compared.append(router)
            tables.append(counts)
    if not compared:
        return ()
    observed = np.array([_distances(ca.sum(0), cb.sum(0)) for ca, cb in tables])
    permuted = comb(a.units + b.units, a.units) >= _SPLITS_MIN
    by_chance_PL = (_permuted if permuted else _chance_distances)(tables)
    mean, spread = by_chance_PL.mean(0), by_chance_PL.std(0)
    spread = np.where(spread > 0, spread, np.inf)
    largest = ((by_chance_PL - mean) / spread).max(1)
    limit = mean + np.where(np.isfinite(spread), spread, 0) * float(np.quantile(largest, LEVEL))
    return tuple(
        RoutingChange(
            site=site,
            stage=stage,
            total_variation=float(observed[i]),
            chance=min(1.0, float(limit[i])),
            chance_from="steps" if permuted else "tokens",
            changed=bool(observed[i] > limit[i] + 1e-12),
            same_counts=_same_counts(a, b, names),
            **_shifts(*(c.sum(0) for c in tables[i])),
        )
        for i, (site, *names) in enumerate(compared)
    )


def _distances(a: npt.NDArray, b: npt.NDArray) -> Floats:
    """Return the total variation, [...], of counts `[..., E]`."""
    share_a, share_b = (counts / np.maximum(counts.sum(-1, keepdims=True), 1) for counts in (a, b))
    distances: Floats = np.abs(share_a - share_b).sum(-1) / 2
    return distances


def _permuted(tables: Sequence[Sequence[Floats]]) -> Floats:
    """Return distances after permuting the units, [P, L], with the same permutations for all layers."""
    units_a, units_b = (len(side) for side in tables[0])
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(units_a + units_b), (PERMUTATIONS, 1)), axis=1)
    in_a = (order < units_a).astype(np.float64)
    pooled = [np.concatenate(counts) for counts in tables]
    return np.stack([_distances(in_a @ counts, (1 - in_a) @ counts) for counts in pooled], axis=1)


def _chance_distances(tables: Sequence[Sequence[Floats]]) -> Floats:
    """Return distances of tokens drawn from the pooled shares of both sides, [P, L]."""
    rng = np.random.default_rng(0)
    columns = []
    for counts in tables:
        sums = [side.sum(0) for side in counts]
        pooled = sum(sums)
        drawn = [
            rng.multinomial(max(1, round(side.sum() / TOKENS_ALIKE)), pooled / pooled.sum(), PERMUTATIONS)
            for side in sums
        ]
        columns.append(_distances(*drawn))
    return np.stack(columns, axis=1)


def _shifts(a: Floats, b: Floats) -> dict[str, tuple[ExpertShift, ...]]:
    share_a, share_b = a / a.sum(), b / b.sum()
    order = np.argsort(share_b - share_a, kind="stable")

    def named(experts: Sequence[int], sign: int) -> tuple[ExpertShift, ...]:
        return tuple(
            ExpertShift(expert=int(e), share_a=float(share_a[e]), share_b=float(share_b[e]))
            for e in experts[:_EXPERTS_NAMED]
            if sign * (share_b[e] - share_a[e]) > 0
        )

    return {"gained": named(order[::-1].tolist(), 1), "lost": named(order.tolist(), -1)}


def _same_counts(a: Side, b: Side, names: Sequence[str]) -> bool:
    x, y = (s.calls.assignments.take(s.rows(name)) for s, name in zip((a, b), names, strict=True))
    return np.array_equal(x.starts, y.starts) and np.array_equal(x.values, y.values)
