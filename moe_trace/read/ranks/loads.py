"""Load and traffic of each rank, from the recorded counts alone.

Axes: R ranks, E experts. A slot is one (token, expert) pair. Ranks that route the same tokens make one
decision, which is counted once; each rank computes the slots of the experts that it holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from moe_trace.data.calls.table import IntArray
from moe_trace.data.schema import ExpertExchange, Parallel, Recording, RoutingSample

CallKey = tuple[str, int]
"""(module path of the router, index of its recorded forward call on each rank)"""


@dataclass(frozen=True, kw_only=True)
class RankRecords:
    """Recordings of a run's ranks, one each."""

    by_rank: Mapping[int, Recording]

    @cached_property
    def experts(self) -> dict[str, int]:
        """Number of experts, or of load-balancer slots, that ranks hold, by module path of the router."""
        found: dict[str, int] = {}
        for recording in self.by_rank.values():
            for router in recording.routers:
                size = router.num_slots or router.num_experts
                found[router.name] = max(found.get(router.name, 0), size)
        return found

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Ranks with a recording, ascending."""
        return tuple(sorted(self.by_rank))

    @cached_property
    def world_size(self) -> int:
        """World size that the recordings report, at least the highest rank + 1."""
        sizes = [r.world_size for r in self.by_rank.values()]
        return max([*sizes, max(self.ranks) + 1])

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks without a recording."""
        return tuple(rank for rank in range(self.world_size) if rank not in self.by_rank)

    def parallel(self, rank: int) -> Parallel:
        """Return the rank's parallel configuration, or that of a single rank if it has none."""
        return self.by_rank[rank].parallel or Parallel(mesh={}, token_ranks=(rank,))

    def counting_ranks(self) -> tuple[int, ...]:
        """Return the first recorded rank of each set that routes the same tokens."""
        present = set(self.by_rank)
        return tuple(r for r in self.ranks if min(present & {r, *self.parallel(r).token_ranks}) == r)

    @cached_property
    def exchange(self) -> ExpertExchange | None:
        """Exchange that brings tokens to their experts; None without one, or if the ranks differ."""
        found = {self.parallel(rank).expert_exchange for rank in self.ranks} - {None}
        return found.pop() if len(found) == 1 else None


def calls_by_key(recording: Recording) -> dict[CallKey, RoutingSample]:
    """Return the forward calls by number; the n-th call of a router is the same call on all ranks."""
    counts: defaultdict[str, int] = defaultdict(int)
    found = {}
    for sample in recording.samples:
        if sample.phase == "forward":
            found[sample.name, counts[sample.name]] = sample
            counts[sample.name] += 1
    return found


def held_matrix(records: RankRecords, name: str, group: Sequence[int]) -> IntArray | None:
    """Return 1 where a rank of the group holds an expert, [G, E], or a slot of a load balancer, [G, P].

    A rank without a recording holds what no other of its group does; None if two are missing.
    """
    experts = records.experts[name]
    held = np.zeros((len(group), experts), np.int64)
    for row, rank in enumerate(group):
        ids = _experts_of_rank(records, name, rank)
        if ids is not None:
            held[row, [i for i in ids if 0 <= i < experts]] = 1
    unknown = [row for row, rank in enumerate(group) if rank not in records.by_rank]
    if len(unknown) > 1:
        return None
    for row in unknown:
        held[row] = held.sum(0) == 0
    return held


def _experts_of_rank(records: RankRecords, name: str, rank: int) -> Sequence[int] | None:
    if rank not in records.by_rank:
        return None
    for router in records.by_rank[rank].routers:
        if router.name == name:
            everything = range(router.num_slots or router.num_experts)
            return everything if router.held_experts is None else router.held_experts
    return ()


@dataclass(frozen=True, kw_only=True)
class CallLoad:
    """Load of one router call on all ranks together."""

    key: CallKey
    step: int
    site: str
    load_R: IntArray
    """[R] slots that each rank's experts compute."""
    sent_RW: IntArray | None = field(repr=False)
    """[R, W] slots from each recorded rank (row) to each rank of the world; None without an all-to-all."""
    expert_E: IntArray
    """[E] slots per expert, counting each token once."""
    slot_P: IntArray | None = field(default=None, repr=False)
    """[P] load of each slot of a load balancer, counting each token once; None without one."""
    slot_experts_P: IntArray | None = field(default=None, repr=False)
    """[P] expert in each slot."""
    exact: bool = True
    """Whether the dispatch of each rank is known: a slot of weight 0 counts as skipped, but may be sent."""


def find_loads(records: RankRecords) -> tuple[CallLoad, ...]:
    """Return the load of every call that all recorded ranks made, in the order of the first rank."""
    tables = {rank: calls_by_key(records.by_rank[rank]) for rank in records.ranks}
    counting = records.counting_ranks()
    groups = {records.parallel(r).expert_ranks or (r,) for r in records.ranks}
    matrices_of = cache(lambda name: {group: held_matrix(records, name, group) for group in groups})
    loads = []
    for key, first in tables[records.ranks[0]].items():
        if not all(key in table for table in tables.values()):
            continue
        samples = {rank: table[key] for rank, table in tables.items()}
        sent = _sent_matrix(records, samples, matrices_of(key[0]))
        slots = [samples[rank].slot_assignments for rank in counting]
        known = [slots_P for slots_P in slots if slots_P is not None]
        loads.append(
            CallLoad(
                key=key,
                step=first.step,
                site=first.site,
                # If both exchanges are in use, a forward that sends nothing is reduced over the ranks.
                load_R=_load(records, samples, matrices_of(key[0]))
                if sent is None or not sent.any()
                else sent.sum(axis=0)[list(records.ranks)],
                sent_RW=sent,
                exact=all(map(_is_exact, samples.values())),
                expert_E=_sum([samples[rank].assignments for rank in counting]),
                slot_P=_sum(known) if len(known) == len(slots) else None,
                slot_experts_P=first.slot_experts,
            )
        )
    return tuple(loads)


def _is_exact(sample: RoutingSample) -> bool:
    if sample.slot_assignments is not None and sample.dispatched is not None:
        return False
    return sample.dispatched is not None or sample.computed_slots == int(sample.assignments.sum())


def _sent_matrix(
    records: RankRecords,
    samples: Mapping[int, RoutingSample],
    held: Mapping[tuple[int, ...], IntArray | None],
) -> IntArray | None:
    if records.exchange != "all_to_all":
        return None
    sent = np.zeros((len(records.ranks), records.world_size), np.int64)
    counting = records.counting_ranks()
    for row, rank in enumerate(records.ranks):
        sliced = samples[rank].dispatched is not None and samples[rank].slot_assignments is None
        if not sliced and rank not in counting:
            continue  # a rank that routes the same tokens already counts for this one
        group = records.parallel(rank).expert_ranks or (rank,)
        matrix = held[group]
        if matrix is None:
            return None
        sample = samples[rank]
        slots = sample.slot_assignments  # includes those of ranks that share its tokens, see above
        if slots is None:
            slots = sample.assignments if sample.dispatched is None else sample.dispatched
        sent[row, list(group)] = _sum_by_holder(matrix, slots)
    return sent


def _sum_by_holder(held_GE: IntArray, slots_E: IntArray) -> IntArray:
    """Sum slots by the rank that holds their expert, [G]; float64 is exact to 2**53 and has fast products."""
    experts = min(held_GE.shape[1], len(slots_E))
    return np.rint(held_GE[:, :experts].astype(np.float64) @ slots_E[:experts].astype(np.float64)).astype(
        np.int64
    )


def _load(
    records: RankRecords,
    samples: Mapping[int, RoutingSample],
    held: Mapping[tuple[int, ...], IntArray | None],
) -> IntArray:
    load = np.zeros(len(records.ranks), np.int64)
    for row, rank in enumerate(records.ranks):
        group = records.parallel(rank).expert_ranks or (rank,)
        matrix, slots = held[group], samples[rank].slot_assignments
        slots = samples[rank].assignments if slots is None else slots
        held_experts = _experts_of_rank(records, samples[rank].name, rank) if matrix is None else None
        if matrix is not None:
            load[row] = _sum_by_holder(matrix, slots)[group.index(rank)]
        elif held_experts is not None:
            load[row] = slots[[i for i in held_experts if i < len(slots)]].sum()
    return load


def expert_load_of_rank(loads: Sequence[CallLoad], held_E: IntArray) -> IntArray:
    """Return the slots that a rank computes of each expert, [E], in these calls of one router.

    Args:
        held_E: Row of `held_matrix` for the rank, [E] or [P].
    """
    total = np.zeros(max(len(load.expert_E) for load in loads), np.int64)
    for load in loads:
        if load.slot_P is None or load.slot_experts_P is None:
            total[: len(load.expert_E)] += held_E[: len(load.expert_E)] * load.expert_E
            continue
        known = np.flatnonzero(load.slot_experts_P >= 0)
        np.add.at(total, load.slot_experts_P[known], (held_E * load.slot_P)[known])
    return total


def _sum(arrays: Sequence[IntArray]) -> IntArray:
    total = np.zeros(max(map(len, arrays)), np.int64)
    for array in arrays:
        total[: len(array)] += array
    return total
