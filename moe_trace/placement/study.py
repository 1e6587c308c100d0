"""Plans for several cluster sizes, chosen on some observations and evaluated on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.placement.counts import ExpertCounts
from moe_trace.placement.evaluation import Judgement, judge, least_without_copies
from moe_trace.placement.plan import Floats, Plan
from moe_trace.placement.planner import MAX_BLOCKS, PlanOptions, blocks_of, check_options, make_plans
from moe_trace.placement.split import MAX_FOLDS, Split


@dataclass(frozen=True, kw_only=True)
class JudgedPlan:
    """A kind of plan, over all folds F. Loads and slots are summed over the folds' evaluated observations."""

    name: str
    max_over_mean_FL: Floats
    """Load of the busiest rank ÷ mean load, over all evaluated observations of the fold together."""
    per_observation_FL: Floats
    """Mean over evaluated observations of each one's own max ÷ mean."""
    all_layers_F: Floats
    """Sum over layers of the busiest rank's load ÷ sum of the mean loads."""
    loads_LR: Floats
    slots_WL: Floats
    """Slots by where they are computed, as in `Judgement.slots_WL`."""


@dataclass(frozen=True, kw_only=True)
class ClusterStudy:
    """Plans for one cluster size."""

    options: PlanOptions
    plans: tuple[JudgedPlan, ...]
    least_without_copies_FL: Floats
    """Lower bound for plans without copies, on the evaluated observations."""
    final: tuple[Plan, ...]
    """The same kinds of plans, chosen on all observations that any fold chose on, for deployment."""


@dataclass(frozen=True, kw_only=True)
class PlacementStudy:
    """Result of `moe-trace placement`."""

    counts: ExpertCounts
    split: Split
    observations: int
    """Number of evaluated observations, over all folds."""
    clusters: tuple[ClusterStudy, ...]


def study_placement(counts: ExpertCounts, split: Split, options: Sequence[PlanOptions]) -> PlacementStudy:
    """Choose and evaluate plans for each of the options.

    Raises:
        UsageError: Options do not fit the number of experts.
    """
    for chosen in options:
        check_options(chosen, counts.num_experts)
    return PlacementStudy(
        counts=counts,
        split=split,
        observations=sum(len(fold.judged) for fold in split.folds),
        clusters=tuple(_study(counts, split, chosen) for chosen in options),
    )


def _study(counts: ExpertCounts, split: Split, options: PlanOptions) -> ClusterStudy:
    judged: dict[str, list[Judgement]] = {}
    least = []
    for fold in split.folds:
        held_out = counts.counts_SLE[list(fold.judged)]
        for plan in _choose(counts, fold.chosen, options):
            judged.setdefault(plan.name, []).append(judge(plan, held_out))
        least.append(least_without_copies(held_out, options.cluster.ranks))
    return ClusterStudy(
        options=options,
        plans=tuple(_combine_folds(name, found) for name, found in judged.items()),
        least_without_copies_FL=np.stack(least),
        final=_choose(counts, split.chosen, options),
    )


def _choose(counts: ExpertCounts, chosen: Sequence[int], options: PlanOptions) -> tuple[Plan, ...]:
    """Choose on a few blocks of steps, or on texts scaled to equal weight, as a plan should fit all."""
    max_observations = MAX_BLOCKS if counts.kind == "step" else MAX_FOLDS
    return make_plans(blocks_of(counts.counts_SLE[list(chosen)], max_observations), options)


def _combine_folds(name: str, folds: Sequence[Judgement]) -> JudgedPlan:
    return JudgedPlan(
        name=name,
        max_over_mean_FL=np.stack([fold.max_over_mean_L for fold in folds]),
        per_observation_FL=np.stack([fold.per_observation_L for fold in folds]),
        all_layers_F=np.array([fold.max_over_mean for fold in folds]),
        loads_LR=np.sum([fold.loads_LR for fold in folds], axis=0),
        slots_WL=np.sum([fold.slots_WL for fold in folds], axis=0),
    )
