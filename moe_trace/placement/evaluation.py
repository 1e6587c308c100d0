"""Evaluate a plan on counts: load per rank, traffic, and a lower bound for plans without copies.

The traffic model: each rank holds 1/R of every expert's tokens, and each copy of an expert computes an equal
share of its slots. Under both, as many slots as possible stay on their own rank, then on their own node; the
rest crosses nodes. A slot that leaves its rank moves `slot_bytes` to its expert and as many back. Slots move
separately, as in the all-to-all of transformers and Megatron (kernels that send a token once to a node move
less).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.placement.plan import Floats, Ints, Plan

WHERE = ("own_rank", "own_node", "other_node")
"""Where a slot is computed: on the token's rank, on another rank of its node, or on another node."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Balance and traffic of a plan on some observations; NaN where a layer has no assignment in them."""

    loads_LR: Floats
    """Assignments that each rank computes, summed over all observations."""
    max_over_mean_L: Floats
    """Load of the busiest rank ÷ mean load of the ranks, from `loads_LR`."""
    per_observation_L: Floats
    """Mean over observations of each one's own max ÷ mean, since ranks wait for each other in every step."""
    slots_WL: Floats
    """[`WHERE`, L] slots by where they are computed, summed over all observations."""

    @property
    def max_over_mean(self) -> float:
        """Sum of the busiest ranks' loads ÷ sum of the mean loads, over all layers."""
        return float(self.loads_LR.max(axis=1).sum() / self.loads_LR.mean(axis=1).sum())


def judge(plan: Plan, counts_SLE: Ints) -> Judgement:
    """Compute the load per rank under the plan, where copies of an expert share its load equally."""
    shares_LER = plan.shares_LER()
    loads_LSR = np.stack([counts_SLE[:, layer] @ shares_ER for layer, shares_ER in enumerate(shares_LER)])
    loads_LR = loads_LSR.sum(axis=1)
    return Judgement(
        loads_LR=loads_LR,
        max_over_mean_L=_max_over_mean(loads_LR),
        per_observation_L=known_mean(_max_over_mean(loads_LSR), axis=1),
        slots_WL=(_parts_WLE(plan, shares_LER) * counts_SLE.sum(axis=0)).sum(axis=2),
    )


def _parts_WLE(plan: Plan, shares_LER: Floats) -> Floats:
    """Return the fraction of each expert's slots computed at each place in `WHERE`; fractions sum to 1."""
    supply = 1.0 / plan.cluster.ranks
    own_LER = np.minimum(supply, shares_LER)
    by_node = (*own_LER.shape[:2], plan.cluster.nodes, plan.cluster.ranks_per_node)
    left_LEN = (supply - own_LER).reshape(by_node).sum(axis=3)
    wanted_LEN = (shares_LER - own_LER).reshape(by_node).sum(axis=3)
    own_rank = own_LER.sum(axis=2)
    own_node = np.minimum(left_LEN, wanted_LEN).sum(axis=2) if plan.cluster.nodes > 1 else 1.0 - own_rank
    return np.stack([own_rank, own_node, np.maximum(0.0, 1.0 - own_rank - own_node)])


def _max_over_mean(loads: Floats) -> Floats:
    mean = loads.mean(axis=-1)
    return np.divide(loads.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def known_mean(values: Floats, axis: int | None = None) -> Floats:
    """Return the mean of the values that are not NaN, or NaN where all are."""
    return np.asarray(np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan))


def least_without_copies(counts_SLE: Ints, ranks: int) -> Floats:
    """Return a lower bound of max ÷ mean, [L], for any plan with E / R experts per rank and no copies.

    Some rank holds the hottest expert, together with at least the E / R - 1 coldest ones.
    """
    ordered_LE = np.sort(counts_SLE.sum(axis=0).astype(np.float64), axis=1)
    coldest = ordered_LE.shape[1] // ranks - 1
    least = ordered_LE[:, -1] + ordered_LE[:, :coldest].sum(axis=1)
    mean = ordered_LE.sum(axis=1) / ranks
    return np.maximum(1.0, np.divide(least, mean, out=np.full(mean.shape, np.nan), where=mean > 0))
