"""Judge a plan by counts: load per rank, and what no plan without copies can reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.placement.plan import Floats, Ints, Plan


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How even a plan is on some observations; NaN where a layer has no assignment in them."""

    loads_LR: Floats
    """Assignments that each rank computes, all observations together."""
    max_over_mean_L: Floats
    """The busiest rank's load ÷ the mean rank's, of the loads above."""
    per_observation_L: Floats
    """Mean over observations of each one's own max ÷ mean: ranks wait for each other in every step."""

    @property
    def max_over_mean(self) -> float:
        """All layers: sum of the busiest ranks' loads ÷ sum of the mean loads."""
        return float(self.loads_LR.max(axis=1).sum() / self.loads_LR.mean(axis=1).sum())


def judge(plan: Plan, counts_SLE: Ints) -> Judgement:
    """Load per rank under the plan: copies of an expert share its load evenly."""
    shares = plan.shares_LER()
    layers, ranks = shares.shape[0], shares.shape[2]
    loads_LR, each_L = np.empty((layers, ranks)), np.empty(layers)
    for layer in range(layers):
        loads_SR = counts_SLE[:, layer].astype(np.float64) @ shares[layer]
        loads_LR[layer] = loads_SR.sum(axis=0)
        each = _max_over_mean(loads_SR)
        each_L[layer] = np.nan if np.isnan(each).all() else np.nanmean(each)
    return Judgement(loads_LR=loads_LR, max_over_mean_L=_max_over_mean(loads_LR), per_observation_L=each_L)


def _max_over_mean(loads: Floats) -> Floats:
    mean = loads.mean(axis=-1)
    return np.divide(loads.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def least_without_copies(counts_SLE: Ints, ranks: int) -> Floats:
    """Lower bound of max ÷ mean for any plan with E / R experts a rank and no copies, [L].

    Some rank holds the hottest expert, and beside it at the least the E / R - 1 coldest.
    """
    ordered_LE = np.sort(counts_SLE.sum(axis=0).astype(np.float64), axis=1)
    beside = ordered_LE.shape[1] // ranks - 1
    least = ordered_LE[:, -1] + ordered_LE[:, :beside].sum(axis=1)
    mean = ordered_LE.sum(axis=1) / ranks
    return np.maximum(1.0, np.divide(least, mean, out=np.full(mean.shape, np.nan), where=mean > 0))
