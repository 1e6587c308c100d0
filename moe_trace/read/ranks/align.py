"""Align the clocks of several ranks with one offset per rank, from collectives that the ranks share.

A synchronising collective ends at about the same time on all ranks of its group. The offset of a clock is the
median, over those collectives, of the reference clock's end minus its own. Causality adds constraints: no
rank ends a collective before a rank that sends to it has begun, which bounds the difference of any two
offsets from both sides; an estimate outside the bounds is moved to the nearest offsets that satisfy them. The
residual is printed: the difference, after alignment, between the ends of shared collectives.

Ranks whose traces name the same host share a clock, which is not shifted unless that breaks causality. One
offset per rank cannot follow clocks that drift: NTP keeps them to some microseconds a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from moe_trace.data.calls.placements import Floats
from moe_trace.data.calls.table import IntArray, Mask
from moe_trace.read.file.rank_parts import Alignment, Spread
from moe_trace.read.ranks.shared_calls import RankCalls, SharedCalls, synchronising

_ROUNDS = 10_000
TOLERANCE_NS = 1
"""Tolerance for offsets, which are whole nanoseconds."""


def align(ranks: Sequence[RankCalls], matched: Sequence[SharedCalls], notes: Sequence[str] = ()) -> Alignment:
    """Estimate one offset per rank."""
    usable = synchronising(matched)
    order = sorted(rank_calls.rank for rank_calls in ranks)
    clocks = _clocks(ranks, usable)
    names = list(dict.fromkeys(clocks[rank] for rank in order))
    bounds, medians, weight = _clock_bounds(usable, clocks, names)
    offsets, first = _estimate_offsets(medians, weight)
    offsets = _within_bounds(offsets, bounds, first)
    by_rank = {rank: int(np.rint(offsets[names.index(clocks[rank])])) for rank in order}
    unaligned = tuple(rank for rank in order if first[names.index(clocks[rank])] != 0)
    none = dict.fromkeys(order, 0)
    return Alignment(
        reference=order[0],
        offset_ns=by_rank,
        unaligned=unaligned,
        collectives=sum(len(shared.calls) for shared in usable),
        same_host=len(names) == 1 and len(order) > 1,
        before=_end_spread(usable, none),
        after=_end_spread(usable, by_rank),
        early_before=count_early(usable, none),
        early_after=count_early(usable, by_rank),
        notes=(*notes, *_unaligned_note(unaligned, order[0]), *_base_note(ranks)),
    )


def _unaligned_note(unaligned: Sequence[int], reference: int) -> list[str]:
    if not unaligned:
        return []
    ranks_text = ", ".join(map(str, unaligned))
    clocks = f"the clocks of ranks {ranks_text}" if len(unaligned) > 1 else f"the clock of rank {ranks_text}"
    return [
        f"{clocks} could not be aligned with that of rank {reference}, with which no collective is shared: "
        "times stand beside its own as recorded"
    ]


def _base_note(ranks: Sequence[RankCalls]) -> list[str]:
    """Name the ranks whose files do not contain the origin of their times."""
    silent = [rank_calls for rank_calls in ranks if not rank_calls.base_was_written]
    found = ", ".join(str(rank_calls.rank) for rank_calls in silent if rank_calls.base_time_ns)
    unknown = ", ".join(str(rank_calls.rank) for rank_calls in silent if not rank_calls.base_time_ns)
    notes = []
    if found:
        notes.append(
            f"the traces of ranks {found} do not say what their times count from (baseTimeNanoseconds): that "
            "was found from their router calls, to some microseconds"
        )
    if unknown:
        notes.append(
            f"the traces of ranks {unknown} do not say what their times count from, and no router call tells "
            "it: how they stand to the others is known only where they share collectives"
        )
    return notes


def count_early(matched: Sequence[SharedCalls], offset_ns: Mapping[int, int]) -> int:
    """Count pairs of ranks in a collective where the receiver ends before its sender begins."""
    shared_calls = synchronising(matched)
    return sum(
        int(_violates_causality(shared, *on_one_clock(shared, offset_ns)).sum()) for shared in shared_calls
    )


def _violates_causality(shared: SharedCalls, start: IntArray, end: IntArray) -> Mask:
    """Return whether the receiver ends before its sender begins, [C, sender, receiver]."""
    early: Mask = shared.sends & (end[:, None, :] < start[:, :, None] - TOLERANCE_NS)
    return early


def on_one_clock(shared: SharedCalls, offset_ns: Mapping[int, int]) -> tuple[IntArray, IntArray]:
    """Return starts and ends with the offsets added, [C, R] each."""
    offsets = np.array([offset_ns[rank] for rank in shared.ranks], np.int64)
    return shared.start_ns + offsets, shared.end_ns + offsets


def _end_spread(matched: Sequence[SharedCalls], offset_ns: Mapping[int, int]) -> Spread | None:
    spreads = [np.ptp(on_one_clock(shared, offset_ns)[1], axis=1) for shared in matched]
    if not spreads:
        return None
    all_us = np.concatenate(spreads) / 1000
    median, p95 = np.percentile(all_us, (50, 95))
    return Spread(median_us=float(median), p95_us=float(p95), max_us=float(all_us.max()))


# -- clocks ----------------------------------------------------------------------------------------------


def _clocks(ranks: Sequence[RankCalls], usable: Sequence[SharedCalls]) -> dict[int, str]:
    """Return the clock of each rank: its host's if all ranks with that host name then satisfy causality."""
    hosts: defaultdict[str, list[int]] = defaultdict(list)
    for rank_calls in ranks:
        hosts[f"host {rank_calls.host_name}" if rank_calls.host_name else f"rank {rank_calls.rank}"].append(
            rank_calls.rank
        )
    clocks: dict[int, str] = {}
    for host, members in hosts.items():
        keeps = True
        for shared in usable if len(members) > 1 else ():
            on_host = np.isin(shared.ranks, members)
            keeps &= not _violates_causality(shared, shared.start_ns, shared.end_ns)[:, on_host][
                :, :, on_host
            ].any()
        clocks |= {rank: host if keeps else f"rank {rank}" for rank in members}
    return clocks


def _clock_bounds(
    usable: Sequence[SharedCalls], clocks: Mapping[int, str], names: Sequence[str]
) -> tuple[Floats, Floats, IntArray]:
    """Return bounds of offset[b] - offset[a], medians of end[a] - end[b], and counts, [N, N] for N clocks."""
    count = len(names)
    bounds = np.full((count, count), np.inf)
    differences: defaultdict[tuple[int, int], list[IntArray]] = defaultdict(list)
    for shared in usable:
        sending = shared.sends
        place = [names.index(clocks[rank]) for rank in shared.ranks]
        for i, a in enumerate(place):
            for j, b in enumerate(place):
                if a == b:
                    continue
                slack_ns = (shared.end_ns[:, i] - shared.start_ns[:, j])[sending[:, j, i]]
                if len(slack_ns):
                    bounds[a, b] = min(bounds[a, b], float(slack_ns.min()))
                differences[a, b].append(shared.end_ns[:, i] - shared.end_ns[:, j])
    medians, weight = np.zeros((count, count)), np.zeros((count, count), np.int64)
    for (a, b), parts in differences.items():
        every = np.concatenate(parts)
        medians[a, b], weight[a, b] = float(np.median(every)), len(every)
    return bounds, medians, weight


def _estimate_offsets(medians: Floats, weight: IntArray) -> tuple[Floats, IntArray]:
    """Return offsets along the pairs that share most, and the first clock that each is connected to."""
    offsets, first = np.zeros(len(medians)), np.full(len(medians), -1, np.int64)
    for start in range(len(medians)):
        if first[start] >= 0:
            continue
        first[start] = start
        while (open_pairs := np.where((first == start)[:, None] & (first < 0)[None, :], weight, 0)).any():
            a, b = np.unravel_index(int(open_pairs.argmax()), open_pairs.shape)
            offsets[b] = offsets[a] + medians[a, b]
            first[b] = start
    return offsets, first


def _within_bounds(offsets: Floats, bounds: Floats, first: IntArray) -> Floats:
    """Move the offsets until offset[b] - offset[a] <= bounds[a, b] for all pairs, the worst pair first."""
    offsets = offsets.copy()
    for _ in range(_ROUNDS):
        excess = offsets[None, :] - offsets[:, None] - bounds
        a, b = np.unravel_index(int(excess.argmax()), excess.shape)
        if excess[a, b] <= TOLERANCE_NS / 4:
            break
        offsets[a] += excess[a, b] / 2
        offsets[b] -= excess[a, b] / 2
    return offsets - offsets[first]
