"""Plans chosen on some observations: contiguous, balanced, replicated, and replicated within nodes.

Replication and the two levels follow the published description of DeepSeek's expert-parallel load balancer
(EPLB): copy the hottest experts and pack the copies in balance; with several nodes, first pack experts (or
groups of experts) onto nodes in balance, then copy and pack within each node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.placement.packing import as_items, by_bin, normalised, pack, part_copies, replicate
from moe_trace.placement.plan import Cluster, Floats, Ints, Plan, contiguous_plan, divisors
from moe_trace.placement.refine import refine

MAX_BLOCKS = 4
"""Most blocks of steps that a plan is chosen on: it should be even in each, not only in their sum."""
MAX_REPLICAS = 64


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Cluster and constraints to plan for."""

    cluster: Cluster
    replicas: int = 1
    """Slots per rank for extra copies (DeepSeek-V3 prefills with one on each of 32 ranks)."""
    groups: int | None = None
    """Number of groups of neighbouring experts that stay on one node; None places each expert by itself."""
    hedge: bool = False
    """Whether plans with copies should also be even for an input that chooses all experts equally."""


def check_options(options: PlanOptions, num_experts: int) -> None:
    """Check that the options fit the number of experts.

    Raises:
        UsageError: Numbers do not divide each other, or `replicas` is out of range.
    """
    cluster, groups = options.cluster, options.groups
    contiguous_plan(1, num_experts, cluster)
    if not 1 <= options.replicas <= MAX_REPLICAS:
        raise UsageError(
            f"found --replicas {options.replicas}, expected 1 to {MAX_REPLICAS} slots a rank for second "
            "copies; plans without copies are shown in any case"
        )
    if groups is None:
        return
    if groups < 1 or num_experts % groups or groups % cluster.nodes:
        fitting = [g for g in range(1, num_experts + 1) if num_experts % g == 0 and g % cluster.nodes == 0]
        raise UsageError(
            f"found {groups} groups for {num_experts} experts on {cluster.nodes} nodes, expected groups of "
            "one size and as many on every node; choose --groups from "
            f"{', '.join(map(str, fitting)) or divisors(num_experts)}"
        )


def blocks_of(counts_SLE: Ints, most: int = MAX_BLOCKS) -> Floats:
    """Sum the observations into at most `most` blocks of consecutive ones, [L, E, B]."""
    parts = np.array_split(counts_SLE, min(len(counts_SLE), most))
    return np.stack([part.sum(axis=0) for part in parts], axis=2).astype(np.float64)


def make_plans(blocks_LEB: Floats, options: PlanOptions) -> tuple[Plan, ...]:
    """Make all plans from the blocks.

    Raises:
        UsageError: See `check_options`.
    """
    layers, experts, _ = blocks_LEB.shape
    check_options(options, experts)
    cluster = options.cluster
    weights = normalised(blocks_LEB, cluster.ranks)
    for_copies = _with_even_block(weights, cluster.ranks) if options.hedge else weights
    orders = {
        "balanced": _plan_without_copies(weights, options),
        "replicated": _replicated(for_copies, options),
    }
    if cluster.nodes > 1:
        orders["hierarchical"] = _hierarchical(for_copies, options)
    plans = {name: Plan(name, cluster, experts, order) for name, order in orders.items()}
    return contiguous_plan(layers, experts, cluster), *plans.values()


def _with_even_block(weights: Floats, ranks: int) -> Floats:
    """Append a block in which all experts have equal weight; without copies every plan is even in it."""
    layers, experts, _ = weights.shape
    return np.concatenate([weights, np.full((layers, experts, 1), ranks / experts)], axis=2)


def _plan_without_copies(weights: Floats, options: PlanOptions) -> Ints:
    """Plan without copies; layers for which contiguous is no worse on the same blocks stay contiguous."""
    ranks = options.cluster.ranks
    planned = refine(by_bin(pack(weights, ranks)), weights, ranks)
    contiguous = np.tile(np.arange(weights.shape[1]), (len(weights), 1))
    not_better = _hottest(planned, weights, ranks) >= _hottest(contiguous, weights, ranks)
    return np.where(not_better[:, None], contiguous, planned)


def _hottest(items_LI: Ints, weights: Floats, bins: int) -> Floats:
    """Return the mean over blocks of the hottest bin's load, per layer."""
    values = np.take_along_axis(weights, items_LI[:, :, None], axis=1)
    loads = values.reshape(len(items_LI), bins, items_LI.shape[1] // bins, -1).sum(axis=2)
    hottest: Floats = loads.max(axis=1).mean(axis=1)
    return hottest


def _replicated(weights: Floats, options: PlanOptions) -> Ints:
    ranks = options.cluster.ranks
    copies = replicate(weights, ranks * options.replicas, most=ranks)
    owners, items = as_items(weights, copies)
    order = part_copies(by_bin(pack(items, ranks, owners)), items, ranks, owners)
    order = refine(order, items, ranks, owners)
    return np.take_along_axis(owners, order, axis=1)


def _hierarchical(weights: Floats, options: PlanOptions) -> Ints:
    """Pack groups onto nodes, then plan each node separately, as a layer of its own."""
    layers, experts, blocks = weights.shape
    nodes = options.cluster.nodes
    groups = options.groups or experts
    if groups % nodes:  # as in EPLB, groups that do not divide evenly among the nodes stay in one pool
        return _replicated(weights, options)
    size = experts // groups
    group_weights = weights.reshape(layers, groups, size, blocks).sum(axis=2)
    group_order = refine(by_bin(pack(group_weights, nodes)), group_weights, nodes)
    experts_of = (group_order[:, :, None] * size + np.arange(size)).reshape(layers * nodes, experts // nodes)
    layer_of = np.repeat(np.arange(layers), nodes)[:, None]
    within = PlanOptions(cluster=Cluster(options.cluster.ranks_per_node), replicas=options.replicas)
    local = _replicated(weights[layer_of, experts_of], within)
    return np.take_along_axis(experts_of, local, axis=1).reshape(layers, -1)
