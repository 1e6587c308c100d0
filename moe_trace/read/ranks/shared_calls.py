"""Match the collectives of different ranks that are the same call of a group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moe_trace.data.calls.table import CallTable, IntArray, Mask, routers_ranged
from moe_trace.data.schema import Parallel, RoutingSample
from moe_trace.data.trace_json.comms import CommKind
from moe_trace.data.trace_json.events import spans_ns
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.file.trace_file import TraceFile
from moe_trace.read.ranks.collective_times import Collective, find_collectives

SYNCHRONISING: frozenset[CommKind] = frozenset(
    {"all_to_all", "all_gather", "all_reduce", "reduce_scatter", "barrier"}
)
"""Collectives that no rank ends before every rank that sends to it has begun."""

APART_NS = 1_000_000_000
"""Containers may share a host's name without its clock, but NTP keeps their clocks closer than this."""


def clock_base_ns(written_ns: int, samples: Sequence[RoutingSample]) -> int:
    """Return the origin of the trace's times on the host's clock.

    If the file lacks it, it follows from router calls, whose hooks read the host's clock just inside their
    range. The smallest difference of the two is the origin, up to the microseconds from the range's start to
    the hook.
    """
    if written_ns:
        return written_ns
    calls = CallTable.of(samples)
    known = routers_ranged(calls) & (calls.host_start_ns > 0)
    if not known.any():
        return 0
    return int((calls.host_start_ns[known] - spans_ns(calls.places.span("host", "router"))[known, 0]).min())


@dataclass(frozen=True, eq=False, kw_only=True)
class RankCalls:
    """Collectives of one rank, as in its own trace."""

    rank: int
    base_time_ns: int
    base_was_written: bool = True
    """False if the file lacks the base, which then follows from the router calls."""
    host_name: str | None
    collectives: tuple[Collective, ...] = field(repr=False)
    groups: tuple[tuple[int, ...], ...] = ()
    parallel: Parallel | None = None


def rank_calls(trace: TraceFile, kernels: Kernels) -> RankCalls:
    """Collect the collectives of one rank's trace."""
    recording = trace.recording
    return RankCalls(
        rank=recording.rank,
        base_time_ns=clock_base_ns(trace.base_time_ns, recording.samples),
        base_was_written=bool(trace.base_time_ns),
        host_name=trace.host_name,
        collectives=find_collectives(recording.samples, trace.events, kernels),
        groups=trace.groups,
        parallel=recording.parallel,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedCalls:
    """C calls of one kind that the R ranks of a group made together, one per row."""

    kind: CommKind
    group: tuple[int, ...]
    """All members, including those without a trace."""
    ranks: tuple[int, ...]
    """Members with a trace, which are the columns."""
    calls: tuple[tuple[Collective, ...], ...] = field(repr=False)
    """[C][R] collectives."""
    start_ns: IntArray = field(repr=False)
    """[C, R] arrival of each rank on its own clock, since the epoch."""
    end_ns: IntArray = field(repr=False)

    @cached_property
    def sends(self) -> Mask:
        """Whether the row's rank sends to the column's, [C, R, R], as all-to-alls may have empty parts."""
        count = len(self.ranks)
        found = np.ones((len(self.calls), count, count), dtype=bool)
        if self.kind == "all_to_all":
            place = [self.group.index(rank) for rank in self.ranks]
            for c, row in enumerate(self.calls):
                for r, collective in enumerate(row):
                    split = collective.facts.split_in
                    if split and len(split) == len(self.group):
                        found[c, r] = np.array(split)[place] > 0
        found[:, range(count), range(count)] = False
        return found


class _Key(NamedTuple):
    name: str
    group: tuple[int, ...]
    kind: CommKind


def match_calls(ranks: Sequence[RankCalls]) -> tuple[list[SharedCalls], list[str]]:
    """Match by group (its ranks, and its name if the trace has it) and kind, then by sequence number.

    If the trace has no sequence numbers (torch 2.11 and 2.13 write none), match by order within group and
    kind: all members call a group's collectives in one order. A group whose members recorded different
    numbers of calls is rejected, since the first call of one may then be the second of another.

    Returns:
        The matches, and a sentence for each rejected group.
    """
    by_key: dict[_Key, dict[int, list[Collective]]] = {}
    for rank_calls in ranks:
        for collective in rank_calls.collectives:
            if (key := _key(collective, rank_calls)) is not None:
                by_key.setdefault(key, {}).setdefault(rank_calls.rank, []).append(collective)
    base = {rank_calls.rank: rank_calls.base_time_ns for rank_calls in ranks}
    hosts = {rank_calls.rank: rank_calls.host_name for rank_calls in ranks}
    matched, refused = [], []
    for key, calls in by_key.items():
        members = tuple(rank for rank in key.group if rank in base)
        if len(members) < 2:
            continue
        lists = [calls.get(rank, []) for rank in members]
        same_length = len({len(found) for found in lists}) == 1
        rows = _match_by_sequence(lists) or (list(zip(*lists, strict=True)) if same_length else None)
        if rows is None:
            counts = ", ".join(f"rank {rank}: {len(calls.get(rank, ()))}" for rank in members)
            refused.append(
                f"{key.kind} of the group {list(key.group)} cannot be matched: the ranks recorded different "
                f"numbers of calls ({counts}); record the same steps on all ranks"
            )
        # Calls without times are removed after matching, as earlier removal would shift the order.
        elif timed := [row for row in rows if all(c.work_ns is not None for c in row)]:
            shared = _shared_calls(key, members, timed, base)
            time_gap = _time_gap_reason(shared, hosts)
            if time_gap:
                refused.append(time_gap)
            else:
                matched.append(shared)
    return matched, refused


def _key(collective: Collective, rank_calls: RankCalls) -> _Key | None:
    facts = collective.facts
    group = facts.group
    if group is None and collective.role is not None and rank_calls.parallel is not None:
        group = rank_calls.parallel.expert_ranks or None
    if group is None and len(rank_calls.groups) == 1:
        (group,) = rank_calls.groups
    if group is None or len(group) < 2 or rank_calls.rank not in group:
        return None
    return _Key(facts.group_name or "", group, facts.kind)


def _match_by_sequence(lists: Sequence[Sequence[Collective]]) -> list[tuple[Collective, ...]] | None:
    """Match by sequence number, or return None if a call has none or two have the same."""
    tables = [{call.facts.sequence: call for call in calls} for calls in lists]
    if any(
        None in table or len(table) != len(calls) or not table
        for table, calls in zip(tables, lists, strict=True)
    ):
        return None
    common = sorted(set.intersection(*map(set, tables)))  # type: ignore[type-var]
    return [tuple(table[number] for table in tables) for number in common]


def _shared_calls(
    key: _Key, members: tuple[int, ...], rows: list[tuple[Collective, ...]], base: dict[int, int]
) -> SharedCalls:
    base_R = np.array([base[rank] for rank in members], np.int64)
    work_CR2 = np.array([[call.work_ns for call in row] for row in rows], np.int64)
    return SharedCalls(
        kind=key.kind,
        group=key.group,
        ranks=members,
        calls=tuple(rows),
        start_ns=work_CR2[..., 0] + base_R,
        end_ns=work_CR2[..., 1] + base_R,
    )


def _time_gap_reason(shared: SharedCalls, hosts: dict[int, str | None]) -> str:
    """Explain if, on one host's clock, one rank had ended all of its calls long before another began."""
    first, last = shared.start_ns.min(axis=0), shared.end_ns.max(axis=0)
    for i, a in enumerate(shared.ranks):
        for j, b in enumerate(shared.ranks):
            gap_ns = int(first[j] - last[i])
            if gap_ns > APART_NS and hosts[a] is not None and hosts[a] == hosts[b]:
                return (
                    f"{shared.kind} of the group {list(shared.group)} cannot be matched: rank {b} began its "
                    f"first {gap_ns / 1e9:,.1f} s after rank {a} had ended its last, on the clock of host "
                    f"{hosts[a]}; give the files of one run and one profiling cycle"
                )
    return ""


def synchronising(matched: Iterable[SharedCalls]) -> list[SharedCalls]:
    """Return the calls whose ends can align the clocks."""
    return [shared for shared in matched if shared.kind in SYNCHRONISING]
