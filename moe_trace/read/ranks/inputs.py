"""What each rank's traces say, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moe_trace.data.calls.table import CallTable, IntArray
from moe_trace.data.schema import Recording
from moe_trace.read.ranks.shared_calls import RankCalls

if TYPE_CHECKING:  # a trace of one rank, of which nobody asks these, is reported sooner without them
    from moe_trace.read.ranks.collective_times import SampleIndex
    from moe_trace.read.ranks.loads import CallLoad, RankRecords


@dataclass(frozen=True, eq=False, kw_only=True)
class RankInput:
    """What one rank's traces say."""

    recording: Recording
    calls: RankCalls
    step_us: Mapping[int, float]
    """Duration of the profiler's steps."""
    window_us: float = 0.0
    """From the trace's first event on the host to its last."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a run, and what several answers ask of them, found once."""

    by_rank: Mapping[int, RankInput]
    """Ascending."""

    @staticmethod
    def of(inputs: Sequence[RankInput]) -> Ranks:
        """One of each rank: several of it follow one another, in the order given."""
        by_rank: dict[int, RankInput] = {}
        for one in inputs:
            before = by_rank.get(one.calls.rank)
            by_rank[one.calls.rank] = one if before is None else _joined_inputs(before, one)
        return Ranks(dict(sorted(by_rank.items())))

    @property
    def inputs(self) -> tuple[RankInput, ...]:
        """By rank, ascending."""
        return tuple(self.by_rank.values())

    @property
    def calls(self) -> list[RankCalls]:
        """The collectives of each, by rank, ascending."""
        return [one.calls for one in self.by_rank.values()]

    @cached_property
    def records(self) -> RankRecords:
        """The recording of each."""
        from moe_trace.read.ranks.loads import RankRecords

        return RankRecords(by_rank={rank: one.recording for rank, one in self.by_rank.items()})

    @cached_property
    def loads(self) -> tuple[CallLoad, ...]:
        """Every call that all of them made."""
        from moe_trace.read.ranks.loads import find_loads

        return find_loads(self.records)

    @cached_property
    def index(self) -> dict[int, SampleIndex]:
        """By rank: its router calls."""
        from moe_trace.read.ranks.collective_times import sample_index

        return {rank: sample_index(one.recording) for rank, one in self.by_rank.items()}


def call_numbers(recording: Recording, reached: dict[str, int]) -> IntArray:
    """[N] the how-many-th call of its router each is, on from where `reached` is, which goes on with it."""
    numbers = []
    for name in recording.calls.name.tolist():
        numbers.append(reached.get(name, 0))
        reached[name] = numbers[-1] + 1
    return np.array(numbers, np.int64)


def _joined_inputs(a: RankInput, b: RankInput) -> RankInput:
    """Call numbers of `b` go on after those of `a`; its times count from the base of `a`."""
    reached: dict[str, int] = {}
    for name, call in a.recording.calls.call_keys():
        reached[name] = max(reached.get(name, 0), call + 1)
    by_ns = b.calls.base_time_ns - a.calls.base_time_ns
    calls = b.recording.calls
    moved = [
        replace(
            c,
            host_ns=(c.host_ns[0] + by_ns, c.host_ns[1] + by_ns),
            work_ns=c.work_ns and (c.work_ns[0] + by_ns, c.work_ns[1] + by_ns),
            call=c.call and (c.call[0], c.call[1] + reached.get(c.call[0], 0)),
        )
        for c in b.calls.collectives
    ]
    numbers = calls.call + np.array([reached.get(name, 0) for name in calls.name.tolist()], np.int64)
    samples = [a.recording.calls, calls.with_numbers(call=numbers)]
    collectives = sorted((*a.calls.collectives, *moved), key=lambda c: c.host_ns)
    return RankInput(
        recording=replace(a.recording, samples=CallTable.concatenated(samples)),
        calls=replace(a.calls, collectives=tuple(collectives)),
        step_us={**a.step_us, **b.step_us},
        window_us=a.window_us + b.window_us,
    )
