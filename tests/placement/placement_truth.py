"""Reference results for the planner: exhaustive search, and counting token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np

from moe_trace.placement.plan import Cluster, Plan
from paths import DATA

COUNTS_FILE = DATA / "olmoe_expert_counts.json"


def best_makespan(loads: Sequence[int], bins: int, capacity: int | None = None) -> int:
    """Least possible load of the busiest bin, by trying everything; `capacity` items a bin, or any number."""
    items = tuple(range(len(loads)))

    @cache
    def least(left: tuple[int, ...], bins: int) -> int:
        if bins == 1:
            return sum(loads[i] for i in left)
        if not left:
            return 0
        first, rest = left[0], left[1:]  # the first item's bin, so that bins are not permuted
        sizes = [capacity - 1] if capacity is not None else range(len(rest) + 1)
        best = None
        for size in sizes:
            for others in combinations(rest, size):
                here = loads[first] + sum(loads[i] for i in others)
                if best is not None and here >= best:
                    continue
                worst = max(here, least(tuple(i for i in rest if i not in others), bins - 1))
                best = worst if best is None else min(best, worst)
        assert best is not None
        return best

    return least(items, bins)


def rank_loads(plan: Plan, layer: int, counts_E: np.ndarray) -> list[float]:
    """Load per rank, slot by slot."""
    experts = plan.experts_LP[layer].tolist()
    loads = [0.0] * plan.cluster.ranks
    for slot, expert in enumerate(experts):
        loads[slot // plan.slots_per_rank] += counts_E[expert] / experts.count(expert)
    return loads


def walk_slots(plan: Plan, layer: int, expert: int, slots: int) -> tuple[int, int, int]:
    """Send an expert's slots one at a time: (stay on the rank, within the node, to another node).

    Slots start on the ranks in turn; a copy takes slots / copies of them, no more. `slots` is a multiple
    of ranks and of copies. First each slot tries its own rank, then its own node, then any.
    """
    cluster, experts = plan.cluster, plan.experts_LP[layer].tolist()
    holders = [s // plan.slots_per_rank for s in range(len(experts)) if experts[s] == expert]
    room = {rank: holders.count(rank) * slots // len(holders) for rank in holders}
    waiting = [token % cluster.ranks for token in range(slots)]
    moved = [0, 0, 0]
    near = (
        lambda a, b: a == b,
        lambda a, b: node_of(cluster, a) == node_of(cluster, b),
        lambda a, b: True,
    )
    for distance, is_near in enumerate(near):
        left = []
        for rank in waiting:
            target = next((r for r in room if room[r] and is_near(rank, r)), None)
            if target is None:
                left.append(rank)
                continue
            room[target] -= 1
            moved[distance] += 1
        waiting = left
    assert not waiting and not any(room.values())
    return moved[0], moved[1], moved[2]


def node_of(cluster: Cluster, rank: int) -> int:
    return rank // (cluster.ranks // cluster.nodes)
