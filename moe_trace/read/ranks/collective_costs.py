"""Cost of the MoE layers' collectives on each rank: bytes, time, bandwidth, and waiting for the last rank.

- wait: last arrival of the group - own arrival, on the aligned clock.
- bandwidth: bytes that leave the rank / (time of the collective - wait); 1 GB is 1e9 bytes.
- lost: sum of the waits over ranks, all of it attributed to the rank that arrived last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_trace.data.schema import Recording, RoutingSample
from moe_trace.data.summary import SampleKey
from moe_trace.data.trace_json.coverage import Coverage
from moe_trace.read.file.rank_parts import Alignment
from moe_trace.read.ranks.align import on_one_clock
from moe_trace.read.ranks.collective_times import ROLES, Collective, split_bytes
from moe_trace.read.ranks.loads import CallKey, calls_by_key
from moe_trace.read.ranks.shared_calls import RankCalls, SharedCalls


@dataclass(frozen=True, kw_only=True)
class ExchangeTime:
    """One kind of collective of one layer on one rank, over all its calls."""

    site: str
    part: str
    """`counts`, `dispatch`, `combine`, or the collective's kind if it is no all-to-all."""
    rank: int
    calls: int
    bytes_in: int | None
    """Input bytes of the collectives, including the rank's own part, or None if unknown."""
    bytes_leaving: int | None
    """Input bytes sent to other ranks."""
    timed: int
    """Number of calls whose work is known, which the time covers."""
    time_us: float | None
    """Time, or None if too few calls are known (`Coverage.known`)."""
    wait_us: float | None
    """Waiting time, or None if the ranks' clocks or calls could not be matched."""
    gb_per_s: float | None
    on_device: bool
    """Whether the time is that of kernels, or else of the backend's thread."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """One collective of a layer, on all ranks of its group."""

    site: str
    step: int
    part: str
    lost_us: float
    """Sum of the waits over the ranks of the group."""
    last_rank: int


SampleIndex = Mapping[SampleKey | None, tuple[CallKey, RoutingSample]]
"""Router calls of one rank by a collective's `call`, without those that a filter left out."""


def sample_index(recording: Recording) -> SampleIndex:
    """Map a call's own number to its number among the forward calls of its router."""
    return {(sample.name, sample.call): (key, sample) for key, sample in calls_by_key(recording).items()}


def part_of(collective: Collective) -> str:
    """Return the purpose of the collective in its layer."""
    return collective.role or collective.facts.kind


def find_waits(
    matched: Sequence[SharedCalls], alignment: Alignment, index: Mapping[int, SampleIndex]
) -> tuple[tuple[Wait, ...], dict[tuple[int, int], int]]:
    """Compute the waits of all layers' collectives.

    Returns:
        The waits, and each rank's own wait in nanoseconds by (rank, `id` of its collective).
    """
    waits, own_waits = [], {}
    for shared in matched:
        start, _ = on_one_clock(shared, alignment.offset_ns)
        wait_ns = start.max(axis=1, keepdims=True) - start
        last = start.argmax(axis=1)
        for row, collectives in enumerate(shared.calls):
            found = index[shared.ranks[0]].get(collectives[0].call)
            if found is None:
                continue
            waits_ns = wait_ns[row].tolist()
            for rank, collective, ns in zip(shared.ranks, collectives, waits_ns, strict=True):
                own_waits[rank, id(collective)] = ns
            waits.append(
                Wait(
                    site=found[1].site,
                    step=found[1].step,
                    part=part_of(collectives[0]),
                    lost_us=sum(waits_ns) / 1000,
                    last_rank=shared.ranks[int(last[row])],
                )
            )
    return tuple(waits), own_waits


def exchange_times(
    ranks: Sequence[RankCalls], index: Mapping[int, SampleIndex], own_wait: Mapping[tuple[int, int], int]
) -> tuple[ExchangeTime, ...]:
    """Summarise collectives by layer, part and rank, in the order of the layers."""
    groups: defaultdict[tuple[int, str, str, int], list[Collective]] = defaultdict(list)
    for rank_calls in ranks:
        for collective in rank_calls.collectives:
            found = index[rank_calls.rank].get(collective.call)
            if found is not None:
                sample = found[1]
                groups[sample.layer, sample.site, part_of(collective), rank_calls.rank].append(collective)
    by_rank = {rank_calls.rank: rank_calls for rank_calls in ranks}
    order: dict[str, int] = {role: place for place, role in enumerate(ROLES)}
    ordered = sorted(groups, key=lambda k: (*k[:2], order.get(k[2], len(order)), *k[2:]))
    return tuple(_exchange_time(key, groups[key], by_rank[key[3]], own_wait) for key in ordered)


def _exchange_time(
    key: tuple[int, str, str, int],
    calls: Sequence[Collective],
    rank_calls: RankCalls,
    own_wait: Mapping[tuple[int, int], int],
) -> ExchangeTime:
    _, site, part, rank = key
    waits = [own_wait[rank, id(c)] for c in calls if (rank, id(c)) in own_wait]
    known = len(waits) == len(calls)
    times = [c.time_ns for c in calls if c.time_ns is not None]
    time_ns, wait_ns = sum(times), sum(waits)
    leaving = _sum([_bytes_leaving(c, rank_calls) for c in calls])
    moving_ns = time_ns - wait_ns if known else time_ns
    has_rate = leaving is not None and moving_ns > 0 and len(times) == len(calls)
    return ExchangeTime(
        site=site,
        part=part,
        rank=rank,
        calls=len(calls),
        bytes_in=_sum([c.bytes_in for c in calls]),
        bytes_leaving=leaving,
        timed=len(times),
        time_us=time_ns / 1000 if Coverage(joined=len(times), total=len(calls)).known else None,
        wait_us=wait_ns / 1000 if known else None,
        gb_per_s=(leaving or 0) / moving_ns if has_rate else None,
        on_device=bool(times) and all(c.on_device for c in calls if c.time_ns is not None),
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _bytes_leaving(collective: Collective, rank_calls: RankCalls) -> int | None:
    if collective.facts.kind != "all_to_all":
        return collective.bytes_in
    group = collective.facts.group or (
        rank_calls.parallel.expert_ranks if rank_calls.parallel is not None else ()
    )
    split = split_bytes(collective, "in", len(group))
    if split is None or rank_calls.rank not in group:
        return None
    return sum(split) - split[group.index(rank_calls.rank)]


def account(waits: Sequence[Wait], ranks: Sequence[int]) -> dict[int, float]:
    """Return the time that others spent waiting for each rank, in microseconds."""
    blame = dict.fromkeys(ranks, 0.0)
    for wait in waits:
        blame[wait.last_rank] += wait.lost_us
    return blame
