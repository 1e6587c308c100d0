"""Several traces taken together: each reduced on its own, then added up rank by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.errors import SchemaError, TraceFileError
from moe_trace.data.losses import add_losses
from moe_trace.data.schema import Recording, RouterInfo
from moe_trace.data.summary import SampleKey
from moe_trace.read.file.coverage import TimeCoverage, coverage_notes
from moe_trace.read.file.events import EventTable, Kind
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.launches import find_kernels, router_busy_us
from moe_trace.read.file.parts import Alignment
from moe_trace.read.file.trace_file import Progress, TraceFile, read_trace, split_ranks
from moe_trace.read.ranks.collectives import Collective, Nanoseconds, find_collectives
from moe_trace.read.ranks.load import RankRecords
from moe_trace.read.ranks.ranks import RankInput
from moe_trace.read.ranks.same_run import copies, first_difference, pooled
from moe_trace.read.ranks.shared_calls import RankCalls, clock_base_ns
from moe_trace.read.time.phases import CallTimes, Times, measure_calls
from moe_trace.read.time.surroundings import TraceWork, step_ranges, trace_work

_MERGED = "it is merged from traces that are read here on their own"
_AGAIN = "it holds the same calls as another trace that is read here"


@dataclass(frozen=True)
class Read:
    """One trace, or one rank of it, reduced so far that the events of the next can take its memory."""

    path: Path
    recording: Recording
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
    """Of a merged trace: how its clocks were aligned."""
    notes: tuple[str, ...]

    def narrow(self, chosen: Filter) -> Read:
        """What is left of it by the filters; all other figures follow from that."""
        if not chosen:
            return self
        recording = chosen.narrow(self.recording)
        taken = set(recording.calls.call_keys())
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


def read_all(files: Sequence[Path], progress: Progress | None) -> list[Read]:
    """Read the files one after another; a merged trace gives a `Read` for each of its ranks.

    A merged trace beside the traces that it was made of is left out: it says the same again. So is a trace
    that cannot be read, where others can: a rank that died must not hide the others.

    Raises:
        TraceFileError: none of the files can be read.
    """
    numbers: dict[str, int] = {}
    reads: list[Read] = []
    broken: list[TraceFileError] = []
    for file in files:
        try:
            reads += _reads(file, numbers, several=len(files) > 1, progress=progress)
        except SchemaError:
            raise
        except TraceFileError as error:
            broken.append(error)
    if broken and not reads:
        raise broken[0]
    reads = _without_doubled(reads)
    notes = tuple(f"one of the traces was left out: {error}" for error in broken)
    return [replace(reads[0], notes=(*reads[0].notes, *notes)), *reads[1:]]


def _without_doubled(reads: Sequence[Read]) -> list[Read]:
    single = {read.recording.rank for read in reads if read.alignment is None}
    merged = {r.path: _MERGED for r in reads if r.alignment is not None and r.recording.rank in single}
    others = [read for read in reads if read.path not in merged]
    again = {others[i].path: _AGAIN for i in copies([read.recording for read in others])}
    kept = [read for read in others if read.path not in again]
    notes = tuple(f"{path.name} was left out: {why}" for path, why in sorted((merged | again).items()))
    return [replace(kept[0], notes=(*kept[0].notes, *notes)), *kept[1:]]


def _reads(
    file: Path, numbers: dict[str, int], *, several: bool, progress: Progress | None
) -> Iterator[Read]:
    trace = read_trace(file, progress)
    for part in split_ranks(trace):
        yield _reduce(part, numbers, renumber=several or trace.merged is not None)


def rank_inputs(reads: Sequence[Read]) -> list[RankInput]:
    """One for each rank; several traces of a rank follow one another."""
    return join_inputs([_rank_input(read) for read in reads])


def _rank_input(read: Read) -> RankInput:
    return RankInput(
        recording=read.recording, calls=read.calls, step_us=read.step_us, window_us=read.window_us
    )


def join_inputs(inputs: Sequence[RankInput]) -> list[RankInput]:
    """The inputs of each rank as one, in the order given."""
    by_rank: dict[int, RankInput] = {}
    for one in inputs:
        before = by_rank.get(one.calls.rank)
        by_rank[one.calls.rank] = one if before is None else _joined_inputs(before, one)
    return [by_rank[rank] for rank in sorted(by_rank)]


def _joined_inputs(a: RankInput, b: RankInput) -> RankInput:
    """Call numbers of `b` go on after those of `a`; its times count from the base of `a`."""
    reached: dict[str, int] = {}
    for name, call in a.recording.calls.call_keys():
        reached[name] = max(reached.get(name, 0), call + 1)
    by_ns = b.calls.base_time_ns - a.calls.base_time_ns
    moved = [
        _moved(c, by_ns, c.call and (c.call[0], c.call[1] + reached.get(c.call[0], 0)))
        for c in b.calls.collectives
    ]
    calls = b.recording.calls
    numbers = calls.call + np.array([reached.get(name, 0) for name in calls.name.tolist()], np.int64)
    samples = [a.recording.calls, calls.with_numbers(call=numbers)]
    collectives = sorted((*a.calls.collectives, *moved), key=lambda c: c.host_ns)
    return RankInput(
        recording=replace(a.recording, samples=CallTable.concatenated(samples)),
        calls=replace(a.calls, collectives=tuple(collectives)),
        step_us={**a.step_us, **b.step_us},
        window_us=a.window_us + b.window_us,
    )


def _moved(collective: Collective, by_ns: int, call: SampleKey | None) -> Collective:
    def moved(span: Nanoseconds) -> Nanoseconds:
        return span[0] + by_ns, span[1] + by_ns

    work = collective.work_ns
    return replace(
        collective,
        host_ns=moved(collective.host_ns),
        work_ns=None if work is None else moved(work),
        call=call,
    )


def _reduce(trace: TraceFile, calls: dict[str, int], *, renumber: bool) -> Read:
    recording = trace.recording
    if renumber:
        recording = _renumbered(recording, calls)
    samples = recording.samples
    kernels = find_kernels(trace.events)
    times = measure_calls(samples, trace.events, kernels)
    joined = set(times.samples.call_keys() if times.device_known else ())
    return Read(
        path=trace.path,
        recording=recording,
        times=times,
        busy_us=router_busy_us(samples, trace.events, kernels, joined),
        work=trace_work(samples, trace.events, kernels),
        devices=trace.devices,
        operators=frozenset(trace.events.names),
        unreadable=trace.events.unreadable,
        processes=trace.events.processes,
        calls=RankCalls(
            rank=recording.rank,
            base_time_ns=clock_base_ns(trace.base_time_ns, recording.samples),
            host_name=trace.host_name,
            collectives=find_collectives(samples, trace.events, kernels),
            groups=trace.groups,
            parallel=recording.parallel,
        ),
        step_us={step: (end - start) / 1000 for step, (start, end) in step_ranges(trace.events).items()},
        window_us=_window_us(trace.events),
        alignment=trace.merged.alignment if trace.merged is not None else None,
        notes=trace.merged.notes if trace.merged is not None else (),
    )


def _window_us(events: EventTable) -> float:
    host = events.select((events.kind == Kind.OP) | (events.kind == Kind.RANGE))
    return float(host.end_ns.max() - host.start_ns.min()) / 1000 if len(host) else 0.0


def _renumbered(recording: Recording, calls: dict[str, int]) -> Recording:
    """Call numbers that go on from the files before: each file's own may start again at 0."""
    numbers = []
    for name in recording.calls.name.tolist():
        numbers.append(calls.get(name, 0))
        calls[name] = numbers[-1] + 1
    return replace(recording, samples=recording.calls.with_numbers(call=np.array(numbers, np.int64)))


def combined(reads: Sequence[Read], label: str) -> Recording:
    """One recording of all; calls of ranks that route the same tokens count once, by the first of them.

    Raises:
        TraceFileError: the traces are of different models or runs.
    """
    recordings = [read.recording for read in reads]
    first = recordings[0]
    if len(recordings) == 1:
        return first
    counting = RankRecords(by_rank={r.rank: r for r in reversed(recordings)}).counting_ranks()
    found = first_difference(recordings)
    if found is not None:
        files = " and ".join(dict.fromkeys(reads[i].path.name for i in found[:2]))
        raise TraceFileError(
            f"{label}: {files} are not of one run ({found[2]}); give the files or the folder of one run"
        )
    called = {name for recording in recordings for name in recording.calls.name.tolist()}
    routers: dict[str, RouterInfo] = {}
    for recording in recordings:
        for router in recording.routers:
            routers.setdefault(router.name, router)
    return replace(
        first,
        routers=tuple(routers.values()),
        samples=CallTable.concatenated([r.calls for r in recordings if r.rank in counting]),
        lost=add_losses([r.lost for r in recordings], called),
    )


def joined(parts: Sequence[CallTimes]) -> CallTimes:
    """The times of all calls."""
    if len(parts) == 1:
        return parts[0]
    columns = ("block_host_ns", "host_gap_ns", "device_span_ns", "device_gap_ns", "device_overlap_ns")
    backward = [p.backward for p in parts]
    return CallTimes(
        samples=CallTable.concatenated([p.samples for p in parts]),
        forward=_joined_times([p.forward for p in parts]),
        backward=None
        if all(b is None for b in backward)
        else _joined_times([b or _no_times(p) for b, p in zip(backward, parts, strict=True)]),
        on_device=any(p.on_device for p in parts),
        coverage=sum((p.coverage for p in parts), TimeCoverage()),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in columns},
    )


def _joined_times(parts: Sequence[Times]) -> Times:
    names = Times.__dataclass_fields__
    return Times(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def _no_times(part: CallTimes) -> Times:
    return Times(**{name: np.zeros_like(part.forward.host_ns) for name in Times.__dataclass_fields__})


def notes_of(reads: Sequence[Read]) -> list[str]:
    """What a reader must know of the traces."""
    notes = []
    unreadable = sum(r.unreadable for r in reads)
    if unreadable:
        notes.append(
            f"{unreadable} events of the trace could not be read (odd times or broken text) and are left out"
        )
    notes += [
        f"{r.path.name} holds the events of {r.processes} processes, put together by another tool: these "
        "figures are of the one whose router calls were recorded; give each rank's own trace"
        for r in reads
        if r.processes > 1
    ]
    notes += pooled([(r.path.name, r.recording.rank) for r in reads])
    notes += coverage_notes([r.times.coverage for r in reads])
    placed = sum(len(r.times.samples) for r in reads)
    if not placed and any(r.recording.samples for r in reads):
        notes.append("no call has its ranges in the trace, so there are no phases and no device times")
    return [*notes, *dict.fromkeys(note for read in reads for note in read.notes)]
