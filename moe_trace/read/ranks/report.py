"""Report on the ranks of a run: load of each rank, traffic between ranks, and waiting times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_trace.data.display.notebook import ShortRepr
from moe_trace.data.display.tables import number_ranges
from moe_trace.data.load_stats import max_over_mean
from moe_trace.read.file.rank_parts import Alignment
from moe_trace.read.ranks.align import align
from moe_trace.read.ranks.bytes import BytesCheck, check_bytes
from moe_trace.read.ranks.collective_costs import (
    ExchangeTime,
    Wait,
    account,
    exchange_times,
    find_waits,
)
from moe_trace.read.ranks.inputs import Ranks
from moe_trace.read.ranks.loads import CallLoad, RankRecords, expert_load_of_rank, held_matrix
from moe_trace.read.ranks.shared_calls import match_calls


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerRanks(ShortRepr):
    """One layer across the ranks, with slots summed over all calls."""

    site: str
    name: str
    load: tuple[int, ...]
    """Slots that each rank's experts computed, in the order of `RankReport.ranks`."""
    max_over_mean: float | None
    """Max ÷ mean of the load: 1 is even, R is all on one rank."""
    sent: tuple[tuple[int, ...], ...] | None
    """[R][W] slots from each recorded rank to each of the world, itself included; None without all-to-all."""
    wait_us: float | None
    """Time lost in waiting, summed over all ranks and collectives of the layer."""
    waited_for: int | None
    """Rank that the others waited for longest."""
    hot_rank: int | None
    """Rank with the largest load."""
    hot_expert: int | None
    """Busiest expert of the hot rank."""
    hot_expert_share: float | None
    """Share of the rank's load that this expert takes."""


@dataclass(frozen=True, kw_only=True)
class StepRanks:
    """One step across the ranks."""

    step: int
    load: tuple[int, ...]
    """Slots of each rank, summed over all layers."""
    imbalance: float | None
    """Sum over layers of the largest rank's load / sum over layers of the mean rank's, since ranks wait for
    the busiest in every layer."""
    wait_us: float | None
    share: float | None
    """Share of the ranks' time in this step; None without `prof.step()`."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RankReport(ShortRepr):
    """Report on a run of several ranks."""

    ranks: tuple[int, ...]
    world_size: int
    missing: tuple[int, ...]
    mesh: Mapping[str, int]
    exchange: str | None
    token_sets: tuple[tuple[int, ...], ...]
    """Sets of ranks that route the same tokens and whose counts are one decision."""
    held: Mapping[int, int | None]
    """Number of experts that each rank holds in its first layer, or None for all of them."""
    layers: tuple[LayerRanks, ...]
    steps: tuple[StepRanks, ...]
    exchanges: tuple[ExchangeTime, ...]
    wait_us: float | None
    wait_share: float | None
    """Share of the ranks' time in the profiler's steps, or without `prof.step()` in their whole traces."""
    waited_for_us: Mapping[int, float]
    """Time that others spent waiting for each rank, in microseconds."""
    bytes_check: BytesCheck
    alignment: Alignment
    notes: tuple[str, ...]


def report_ranks(ranks: Ranks, *, known: Alignment | None = None) -> RankReport | None:
    """Report on several ranks, or return None for a single one.

    Args:
        known: Alignment of the times if these ranks were merged into one trace.
    """
    if len(ranks.by_rank) < 2:
        return None
    records, loads, index, calls = ranks.records, ranks.loads, ranks.index, ranks.calls
    matched, refused = match_calls(calls)
    alignment = known if known is not None else align(calls, matched, refused)
    shifts = alignment if known is None else replace(known, offset_ns=dict.fromkeys(records.ranks, 0))
    waits, own_waits = find_waits(matched, shifts, index)
    step_us = {rank: rank_input.step_us for rank, rank_input in ranks.by_rank.items()}
    lost_us = sum(wait.lost_us for wait in waits) if waits else None
    whole_us = _whole_us(step_us, {load.step for load in loads})
    if whole_us is None and all(rank_input.window_us for rank_input in ranks.by_rank.values()):
        whole_us = sum(rank_input.window_us for rank_input in ranks.by_rank.values())
    first = records.parallel(records.ranks[0])
    return RankReport(
        ranks=records.ranks,
        world_size=records.world_size,
        missing=records.missing,
        mesh=first.mesh,
        exchange=records.exchange,
        token_sets=tuple(
            dict.fromkeys(tuple(sorted({r, *records.parallel(r).token_ranks})) for r in records.ranks)
        ),
        held=_held_counts(records),
        layers=_layers(records, loads, waits),
        steps=_steps(records, loads, waits, step_us),
        exchanges=exchange_times(calls, index, own_waits),
        wait_us=lost_us,
        wait_share=lost_us / whole_us if lost_us is not None and whole_us else None,
        waited_for_us=account(waits, records.ranks) if waits else {},
        bytes_check=check_bytes(records, calls, loads, index),
        alignment=alignment,
        notes=(*_notes(records, loads), *alignment.notes),
    )


def _held_counts(records: RankRecords) -> dict[int, int | None]:
    first = {rank: next(iter(records.by_rank[rank].routers), None) for rank in records.ranks}
    held = {rank: None if router is None else router.held_experts for rank, router in first.items()}
    return {rank: None if experts is None else len(experts) for rank, experts in held.items()}


def _notes(records: RankRecords, loads: Sequence[CallLoad]) -> list[str]:
    notes = []
    if records.missing:
        missing = ", ".join(number_ranges(records.missing))
        notes.append(
            f"{len(records.missing)} of {records.world_size} ranks have no trace here (rank {missing}): what "
            "they computed is not in these figures; look at their logs, and give their traces too"
        )
    if any(recording.parallel is None for recording in records.by_rank.values()):
        notes.append(
            "the traces do not say which ranks route the same tokens; each rank's counts are added up as if "
            "its tokens were its own"
        )
    if not loads and any(r.samples for r in records.by_rank.values()):
        notes.append("no router call was recorded on all ranks, so they cannot be compared call by call")
    return notes


# -- layers and steps ------------------------------------------------------------------------------------


def _layers(records: RankRecords, loads: Sequence[CallLoad], waits: Sequence[Wait]) -> tuple[LayerRanks, ...]:
    by_name: defaultdict[str, list[CallLoad]] = defaultdict(list)
    for load in loads:
        by_name[load.key[0]].append(load)
    by_site: defaultdict[str, list[Wait]] = defaultdict(list)
    for wait in waits:
        by_site[wait.site].append(wait)
    routers = records.by_rank[records.ranks[0]].routers
    return tuple(
        _layer(records, by_name[router.name], by_site.get(router.site, []))
        for router in routers
        if by_name[router.name]
    )


def _layer(records: RankRecords, loads: Sequence[CallLoad], waits: Sequence[Wait]) -> LayerRanks:
    load_R = np.sum([load.load_R for load in loads], axis=0)
    parts = [load.sent_RW for load in loads]
    sent = None if any(p is None for p in parts) else np.sum([p for p in parts if p is not None], axis=0)
    hot_rank = records.ranks[int(load_R.argmax())] if load_R.any() else None
    expert, expert_share = _hot_expert(records, loads, hot_rank, int(load_R.max()))
    blame = account(waits, records.ranks)
    return LayerRanks(
        site=loads[0].site,
        name=loads[0].key[0],
        load=tuple(load_R.tolist()),
        max_over_mean=max_over_mean(load_R) if load_R.any() else None,
        sent=None if sent is None else tuple(tuple(row) for row in sent.tolist()),
        wait_us=sum(blame.values()) if waits else None,
        waited_for=max(blame, key=blame.__getitem__) if any(blame.values()) else None,
        hot_rank=hot_rank,
        hot_expert=expert,
        hot_expert_share=expert_share,
    )


def _hot_expert(
    records: RankRecords, loads: Sequence[CallLoad], hot: int | None, total: int
) -> tuple[int | None, float | None]:
    """Return the busiest expert that the rank holds, by all ranks' tokens, and its share of the load."""
    if hot is None:
        return None, None
    group = records.parallel(hot).expert_ranks or (hot,)
    held = held_matrix(records, loads[0].key[0], group)
    if held is None or not total:
        return None, None
    load_E = expert_load_of_rank(loads, held[group.index(hot)])
    busiest = int(load_E.argmax())
    return (busiest, float(load_E[busiest] / load_E.sum())) if load_E.any() else (None, None)


def _steps(
    records: RankRecords,
    loads: Sequence[CallLoad],
    waits: Sequence[Wait],
    step_us: Mapping[int, Mapping[int, float]],
) -> tuple[StepRanks, ...]:
    by_step: defaultdict[int, list[CallLoad]] = defaultdict(list)
    for load in loads:
        by_step[load.step].append(load)
    lost_us: defaultdict[int, float] = defaultdict(float)
    for wait in waits:
        lost_us[wait.step] += wait.lost_us
    steps = []
    for step, members in sorted(by_step.items()):
        load_NR = np.array([load.load_R for load in members], np.int64)
        mean = float(load_NR.mean(axis=1).sum())
        wait_us = lost_us.get(step) if waits else None
        whole_us = _whole_us(step_us, {step})
        steps.append(
            StepRanks(
                step=step,
                load=tuple(load_NR.sum(axis=0).tolist()),
                imbalance=float(load_NR.max(axis=1).sum()) / mean if mean else None,
                wait_us=wait_us,
                share=wait_us / whole_us if wait_us is not None and whole_us else None,
            )
        )
    return tuple(steps)


def _whole_us(step_us: Mapping[int, Mapping[int, float]], steps: set[int]) -> float | None:
    """Return the time of all ranks in those steps, or None if a rank's trace lacks one of them."""
    if not steps or any(step not in of_rank for of_rank in step_us.values() for step in steps):
        return None
    return sum(of_rank[step] for of_rank in step_us.values() for step in steps)
