"""Reduction of one trace, which frees the memory of its events before the next trace is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import Recording
from moe_trace.data.summary import SampleKey
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.opening import Progress
from moe_trace.read.file.rank_parts import Alignment
from moe_trace.read.file.trace_file import TraceFile, read_trace, split_ranks
from moe_trace.read.ranks.collective_times import work_coverage
from moe_trace.read.ranks.inputs import RankInput, call_numbers
from moe_trace.read.ranks.shared_calls import RankCalls, rank_calls
from moe_trace.read.time.call_times import measure_all, routers_busy_us, without_timed
from moe_trace.read.time.outside_moe import TraceWork, step_ranges, trace_work
from moe_trace.read.time.phases import CallTimes

_OPERATORS = "aten::"
"""Prefix of the operators that findings look up by name; kernels' names are many and long."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ReducedTrace:
    """One trace, or one rank of it, without its events."""

    path: Path
    recording: Recording
    """Recording whose calls are numbered from 0 in each router, until `numbered` changes that."""
    own_numbers: npt.NDArray[np.int64]
    """[N] numbers of these calls in the trace itself."""
    times: CallTimes
    busy_us: dict[SampleKey, float]
    work: TraceWork
    devices: tuple[str, ...]
    operators: frozenset[str]
    unreadable: int
    processes: int
    calls: RankCalls
    step_us: dict[int, float]
    window_us: float
    alignment: Alignment | None
    """Alignment of the clocks of a merged trace."""
    notes: tuple[str, ...]

    @property
    def rank_input(self) -> RankInput:
        """Input to a report on several ranks."""
        return RankInput(
            recording=self.recording, calls=self.calls, step_us=self.step_us, window_us=self.window_us
        )

    def narrow(self, chosen: Filter) -> ReducedTrace:
        """Apply the filters; all other metrics are computed from the result."""
        if not chosen:
            return self
        recording = chosen.narrow(self.recording)
        calls = self.recording.calls
        times = zip(calls.call_keys(), calls.step.tolist(), calls.stage.tolist(), strict=True)
        # A mixed call's time is that of the whole.
        taken = {key for key, *time in times if chosen.takes_time(*time)} & set(recording.calls.call_keys())
        rows = [i for i, key in enumerate(self.times.samples.call_keys()) if key in taken]
        collectives = tuple(
            c if c.call is None or c.call in taken else replace(c, call=None, role=None)
            for c in self.calls.collectives
        )
        steps = chosen.steps
        return replace(
            self,
            recording=recording,
            times=self.times.select(np.array(rows, np.int64)),
            busy_us={key: us for key, us in self.busy_us.items() if key in taken},
            calls=replace(self.calls, collectives=collectives),
            step_us={step: us for step, us in self.step_us.items() if not steps or step in steps},
            window_us=0.0,
        )

    def numbered(self, numbers: npt.NDArray[np.int64]) -> ReducedTrace:
        """Replace the numbers of the recording's calls, which are unique before."""
        calls = self.recording.calls
        if np.array_equal(calls.call, numbers):
            return self
        recording = with_call_numbers(self.recording, numbers)
        new = dict(zip(calls.call_keys(), recording.calls.call_keys(), strict=True))
        timed = self.times.samples
        timed_numbers = np.array([new[key][1] for key in timed.call_keys()], np.int64)
        collectives = tuple(replace(c, call=c.call and new[c.call]) for c in self.calls.collectives)
        return replace(
            self,
            recording=recording,
            times=replace(self.times, samples=timed.with_numbers(call=timed_numbers)),
            busy_us={new[key]: us for key, us in self.busy_us.items()},
            calls=replace(self.calls, collectives=collectives),
        )


def reduce_file(path: Path, progress: Progress | None = None) -> Iterator[ReducedTrace]:
    """Reduce the trace, or each rank of a merged one, with calls numbered from 0 in each router.

    Raises:
        TraceFileError: The file cannot be read.
    """
    for part in split_ranks(read_trace(path, progress)):
        yield _reduce(part)


def with_call_numbers(recording: Recording, numbers: npt.NDArray[np.int64]) -> Recording:
    """Replace the numbers of the recording's calls."""
    return replace(recording, samples=recording.calls.with_numbers(call=numbers))


def _reduce(trace: TraceFile) -> ReducedTrace:
    own_numbers = trace.recording.calls.call
    recording = with_call_numbers(trace.recording, call_numbers(trace.recording, {}))
    kernels = find_kernels(trace.events)
    times = measure_all(recording, trace.events, kernels)
    recording = replace(recording, lost=without_timed(recording.lost, times))
    calls = rank_calls(replace(trace, recording=recording), kernels)
    coverage = replace(times.coverage, collectives=work_coverage(calls.collectives))
    times = replace(times, coverage=coverage)
    return ReducedTrace(
        path=trace.path,
        recording=recording,
        own_numbers=own_numbers,
        times=times,
        busy_us=routers_busy_us(recording.calls, times, trace.events, kernels),
        work=trace_work(recording.calls, trace.events, kernels),
        devices=trace.devices,
        operators=frozenset(name for name in trace.events.names if name.startswith(_OPERATORS)),
        unreadable=trace.events.unreadable,
        processes=trace.events.processes,
        calls=calls,
        step_us={step: (end - start) / 1000 for step, (start, end) in step_ranges(trace.events).items()},
        window_us=_window_us(trace.events),
        alignment=trace.merged.alignment if trace.merged is not None else None,
        notes=trace.merged.notes if trace.merged is not None else (),
    )


def _window_us(events: EventTable) -> float:
    host = events.select((events.kind == Kind.OP) | (events.kind == Kind.RANGE))
    return float(host.end_ns.max() - host.start_ns.min()) / 1000 if len(host) else 0.0
