"""Load of the physical slots of a load balancer (EPLB), compared with that of the logical experts.

A balancer replicates hot experts, spreads all over P slots, and moves them during the run. A slot's load is
therefore that of a place. How the replicas of an expert share its tokens is determined between two moves, and
then summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.display.notebook import ShortRepr
from moe_trace.data.load_stats import describe_load
from moe_trace.data.schema import Recording, RouterInfo
from moe_trace.read.ranks.loads import RankRecords, held_matrix

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ReplicatedExpert:
    """An expert that several slots held at once."""

    expert: int
    slots: tuple[int, ...]
    """Slots that held it in such calls."""
    assignments: int
    """Number of assignments in the calls in which several slots held it."""
    max_over_mean: float | None
    """Assignments of the busiest replica ÷ mean over replicas, both summed over the mappings: 1 is evenly
    shared. None without assignments."""


@dataclass(frozen=True, kw_only=True)
class PhysicalLoad:
    """Physical load of one layer, over all calls with known slots."""

    site: str
    name: str
    calls: int
    experts: int
    """Number of logical experts E."""
    maps: int
    """Number of different mappings from slots to experts that the balancer used."""
    assignments: tuple[int, ...]
    """[P] assignments of each slot."""
    slot_experts: tuple[int, ...]
    """[P] last expert in each slot, or -1 for none."""
    slot_ranks: tuple[int, ...] | None
    """[P] rank that holds each slot, or None if unknown."""
    rank_assignments: dict[int, int]
    """Assignments by rank; empty if the placement of slots is unknown."""
    expert_max_over_mean: float | None
    """Max ÷ mean over logical experts, whose replicas' assignments are summed."""
    slot_max_over_mean: float | None
    """Max ÷ mean over the slots in use."""
    rank_max_over_mean: float | None
    replicas: tuple[ReplicatedExpert, ...]
    """Replicated experts, the least evenly shared first."""


@dataclass(frozen=True, kw_only=True, repr=False)
class PhysicalReport(ShortRepr):
    """Physical load of all layers whose experts a load balancer places."""

    layers: tuple[PhysicalLoad, ...]


def report_physical(recording: Recording, records: RankRecords) -> PhysicalReport | None:
    """Report physical loads, or return None if no call has slots.

    Args:
        recording: Recording of all traces together, with each decision once.
        records: Recording of each rank.
    """
    calls = recording.calls
    has_slots = calls.forward & calls.lists["slot_assignments"].known & calls.lists["slot_experts"].known
    if not has_slots.any():
        return None
    calls = calls.take(has_slots)
    layers = [
        _layer(router, of_router, records)
        for router in recording.routers
        if len(of_router := calls.take(calls.of_router(router.name)))
    ]
    return PhysicalReport(layers=tuple(layers))


def _layer(router: RouterInfo, calls: CallTable, records: RankRecords) -> PhysicalLoad:
    counts, held = calls.lists["slot_assignments"], calls.lists["slot_experts"]
    size = int(held.sizes.max())
    maps_MP, map_N = np.unique(held.values.reshape(-1, size).astype(np.int64), axis=0, return_inverse=True)
    loads_MP = counts.summed_by(map_N.ravel(), len(maps_MP), least=size)
    slots_P, last_P = loads_MP.sum(0), maps_MP[map_N.ravel()[-1]]
    ranks_P = _rank_of_slot(router, records, size)
    by_rank = (
        {}
        if ranks_P is None
        else {rank: int(slots_P[ranks_P == rank].sum()) for rank in np.unique(ranks_P).tolist()}
    )
    return PhysicalLoad(
        site=router.site,
        name=router.name,
        calls=len(calls),
        experts=router.num_experts,
        maps=len(maps_MP),
        assignments=tuple(slots_P.tolist()),
        slot_experts=tuple(last_P.tolist()),
        slot_ranks=None if ranks_P is None else tuple(ranks_P.tolist()),
        rank_assignments=by_rank,
        expert_max_over_mean=_max_over_mean(calls.assignments.summed(least=router.num_experts)),
        slot_max_over_mean=_max_over_mean(slots_P[(maps_MP >= 0).any(0)]),
        rank_max_over_mean=_max_over_mean(list(by_rank.values())),
        replicas=_replicas(maps_MP, loads_MP),
    )


def _max_over_mean(load: Ints | Sequence[int]) -> float | None:
    return describe_load(load).max_over_mean if len(load) else None


def _replicas(maps_MP: Ints, loads_MP: Ints) -> tuple[ReplicatedExpert, ...]:
    """Summarise each expert over the mappings in which several slots held it."""
    row, slot = np.nonzero(maps_MP >= 0)
    index, load = (row, maps_MP[row, slot]), loads_MP[row, slot]
    copies_ME, total_ME, most_ME = np.zeros((3, len(maps_MP), int(maps_MP.max()) + 1), np.int64)
    np.add.at(copies_ME, index, 1)
    np.add.at(total_ME, index, load)
    np.maximum.at(most_ME, index, load)
    shared_ME = copies_ME > 1
    total_E, most_E = (total_ME * shared_ME).sum(0), (most_ME * shared_ME).sum(0)
    mean_E = (total_ME * shared_ME / np.maximum(1, copies_ME)).sum(0)
    found = [
        ReplicatedExpert(
            expert=expert,
            slots=tuple(np.flatnonzero((maps_MP[shared_ME[:, expert]] == expert).any(0)).tolist()),
            assignments=int(total_E[expert]),
            max_over_mean=float(most_E[expert] / mean_E[expert]) if total_E[expert] else None,
        )
        for expert in np.flatnonzero(shared_ME.any(0)).tolist()
    ]
    return tuple(sorted(found, key=lambda replica: (-(replica.max_over_mean or 0.0), replica.expert)))


def _rank_of_slot(router: RouterInfo, records: RankRecords, size: int) -> Ints | None:
    groups = {records.parallel(rank).expert_ranks for rank in records.ranks}
    if len(groups) != 1 or not (group := groups.pop()):
        return None
    held_GP = held_matrix(records, router.name, group)
    if held_GP is None or held_GP.shape[1] != size or (held_GP.sum(0) != 1).any():
        return None
    return np.array(group, np.int64)[held_GP.argmax(0)]
