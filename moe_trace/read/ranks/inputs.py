"""Inputs from each rank's traces to reports on several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moe_trace.data.calls.table import CallTable, IntArray
from moe_trace.data.schema import Recording
from moe_trace.read.ranks.shared_calls import RankCalls

if TYPE_CHECKING:  # not imported for a trace of one rank, which is then reported sooner
    from moe_trace.read.ranks.collective_costs import SampleIndex
    from moe_trace.read.ranks.loads import CallLoad, RankRecords


@dataclass(frozen=True, eq=False, kw_only=True)
class RankInput:
    """Input from one rank's traces."""

    recording: Recording
    calls: RankCalls
    step_us: Mapping[int, float]
    """Durations of the profiler's steps."""
    window_us: float = 0.0
    """Time from the first to the last host event of the trace."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a run, with results that several reports share, computed once."""

    by_rank: Mapping[int, RankInput]
    """Input by rank, ascending."""

    @staticmethod
    def of(inputs: Sequence[RankInput]) -> Ranks:
        """Create from inputs; several of one rank are concatenated in the given order."""
        by_rank: dict[int, RankInput] = {}
        for rank_input in inputs:
            before = by_rank.get(rank_input.calls.rank)
            by_rank[rank_input.calls.rank] = (
                rank_input if before is None else _joined_inputs(before, rank_input)
            )
        return Ranks(dict(sorted(by_rank.items())))

    @property
    def inputs(self) -> tuple[RankInput, ...]:
        """Inputs, by rank ascending."""
        return tuple(self.by_rank.values())

    @property
    def calls(self) -> list[RankCalls]:
        """Collectives of each rank, by rank ascending."""
        return [rank_input.calls for rank_input in self.by_rank.values()]

    @cached_property
    def records(self) -> RankRecords:
        """Recording of each rank."""
        from moe_trace.read.ranks.loads import RankRecords

        return RankRecords(by_rank={rank: rank_input.recording for rank, rank_input in self.by_rank.items()})

    @cached_property
    def loads(self) -> tuple[CallLoad, ...]:
        """Load of every call that all ranks made."""
        from moe_trace.read.ranks.loads import find_loads

        return find_loads(self.records)

    @cached_property
    def index(self) -> dict[int, SampleIndex]:
        """Router calls by rank."""
        from moe_trace.read.ranks.collective_costs import sample_index

        return {rank: sample_index(rank_input.recording) for rank, rank_input in self.by_rank.items()}


def call_numbers(recording: Recording, reached: dict[str, int]) -> IntArray:
    """Return each call's number within its router, [N], starting at `reached`, which is updated."""
    numbers = []
    for name in recording.calls.name.tolist():
        numbers.append(reached.get(name, 0))
        reached[name] = numbers[-1] + 1
    return np.array(numbers, np.int64)


def _joined_inputs(a: RankInput, b: RankInput) -> RankInput:
    """Append `b` to `a`: call numbers of `b` continue those of `a`, and its times use the origin of `a`."""
    next_call: dict[str, int] = {}
    for name, call in a.recording.calls.call_keys():
        next_call[name] = max(next_call.get(name, 0), call + 1)
    delta_ns = b.calls.base_time_ns - a.calls.base_time_ns
    calls = b.recording.calls
    moved = [
        replace(
            c,
            host_ns=(c.host_ns[0] + delta_ns, c.host_ns[1] + delta_ns),
            work_ns=c.work_ns and (c.work_ns[0] + delta_ns, c.work_ns[1] + delta_ns),
            call=c.call and (c.call[0], c.call[1] + next_call.get(c.call[0], 0)),
        )
        for c in b.calls.collectives
    ]
    numbers = calls.call + np.array([next_call.get(name, 0) for name in calls.name.tolist()], np.int64)
    samples = [a.recording.calls, calls.with_numbers(call=numbers)]
    collectives = sorted((*a.calls.collectives, *moved), key=lambda c: c.host_ns)
    return RankInput(
        recording=replace(a.recording, samples=CallTable.concatenated(samples)),
        calls=replace(a.calls, collectives=tuple(collectives)),
        step_us={**a.step_us, **b.step_us},
        window_us=a.window_us + b.window_us,
    )
