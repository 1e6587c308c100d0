"""Plans for several cluster sizes, each chosen on some observations and judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.placement.counts import ExpertCounts
from moe_trace.placement.evaluation import Judgement, judge, least_without_copies
from moe_trace.placement.plan import Cluster, Floats, Plan
from moe_trace.placement.planner import MAX_BLOCKS, PlanOptions, blocks_of, check_options, make_plans
from moe_trace.placement.split import MAX_FOLDS, Split
from moe_trace.placement.volume import Volume, routes, volume


@dataclass(frozen=True, kw_only=True)
class JudgedPlan:
    """A way to plan, over all folds F. Loads and volume add up the folds' judged observations."""

    name: str
    max_over_mean_FL: Floats
    """Busiest rank's load ÷ mean load, all judged observations of the fold together."""
    per_observation_FL: Floats
    """Mean over judged observations of each one's own max ÷ mean."""
    all_layers_F: Floats
    """Sum over layers of the busiest rank's load ÷ sum of the mean loads."""
    loads_LR: Floats
    volume: Volume


@dataclass(frozen=True, kw_only=True)
class ClusterStudy:
    """One cluster size."""

    options: PlanOptions
    plans: tuple[JudgedPlan, ...]
    least_without_copies_FL: Floats
    """What no plan without copies can go below, on the judged observations."""
    final: tuple[Plan, ...]
    """The same ways to plan, chosen on all observations that any fold chose on: what to deploy."""


@dataclass(frozen=True, kw_only=True)
class PlacementStudy:
    """The answer of `moe-trace placement`."""

    counts: ExpertCounts
    split: Split
    observations: int
    """Judged observations, over all folds."""
    clusters: tuple[ClusterStudy, ...]


def study_placement(counts: ExpertCounts, split: Split, options: Sequence[PlanOptions]) -> PlacementStudy:
    """Choose and judge plans for each of the options.

    Raises:
        UsageError: options that do not fit the number of experts.
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
    all_counts = counts.counts_SLE
    judged: dict[str, list[tuple[Judgement, Volume]]] = {}
    least = []
    for fold in split.folds:
        held_out = all_counts[list(fold.judged)]
        for plan in _choose(counts, fold.chosen, options):
            found = judge(plan, held_out), volume(routes(plan), held_out)
            judged.setdefault(plan.name, []).append(found)
        least.append(least_without_copies(held_out, options.cluster.ranks))
    chosen = sorted({i for fold in split.folds for i in fold.chosen})
    return ClusterStudy(
        options=options,
        plans=tuple(_over_folds(name, found) for name, found in judged.items()),
        least_without_copies_FL=np.stack(least),
        final=_choose(counts, chosen, options),
    )


def _choose(counts: ExpertCounts, chosen: Sequence[int], options: PlanOptions) -> tuple[Plan, ...]:
    """Steps in a few blocks; texts one by one, each scaled to the same weight: a plan should fit all."""
    most = MAX_BLOCKS if counts.kind == "step" else MAX_FOLDS
    return make_plans(blocks_of(counts.counts_SLE[list(chosen)], most), options)


def _over_folds(name: str, found: Sequence[tuple[Judgement, Volume]]) -> JudgedPlan:
    judgements, volumes = [j for j, _ in found], [v for _, v in found]
    return JudgedPlan(
        name=name,
        max_over_mean_FL=np.stack([j.max_over_mean_L for j in judgements]),
        per_observation_FL=np.stack([j.per_observation_L for j in judgements]),
        all_layers_F=np.array([j.max_over_mean for j in judgements]),
        loads_LR=np.sum([j.loads_LR for j in judgements], axis=0),
        volume=Volume(
            own_rank_L=np.sum([v.own_rank_L for v in volumes], axis=0),
            own_node_L=np.sum([v.own_node_L for v in volumes], axis=0),
            other_node_L=np.sum([v.other_node_L for v in volumes], axis=0),
        ),
    )


def clusters_for(
    ranks: Sequence[int], *, nodes: int, replicas: int, groups: int | None, hedge: bool = False
) -> tuple[PlanOptions, ...]:
    """The same options for several numbers of ranks."""
    return tuple(
        PlanOptions(cluster=Cluster(number, nodes), replicas=replicas, groups=groups, hedge=hedge)
        for number in ranks
    )
