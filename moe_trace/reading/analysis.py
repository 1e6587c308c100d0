"""One or several traces together: a summary with phases, speed, the cost of imbalance and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.errors import TraceFileError
from moe_trace.reading.filters import Filter
from moe_trace.reading.findings import Evidence, Finding, find
from moe_trace.reading.imbalance import ImbalanceCost, imbalance_costs
from moe_trace.reading.launches import find_kernels, router_busy_us
from moe_trace.reading.layers import PhaseReport, Surroundings, report_phases, surroundings
from moe_trace.reading.peaks import find_peak
from moe_trace.reading.phases import CallTimes, Times, measure_calls
from moe_trace.reading.speed import SpeedReport, report_speed
from moe_trace.reading.trace_file import Progress, TraceFile, read_trace
from moe_trace.schema import Lost, Recording, RouterInfo, RoutingSample
from moe_trace.summary import RouterSummary, SampleKey, Summary, summarize


@dataclass(frozen=True, kw_only=True)
class TraceSummary(Summary):
    """A `Summary` of one trace or a folder of traces, with what only the trace itself can tell."""

    files: tuple[str, ...]
    phases: PhaseReport | None
    """None where no call has its ranges in the trace."""
    speed: SpeedReport | None
    imbalance: tuple[ImbalanceCost, ...]
    findings: tuple[Finding, ...]
    samples: tuple[RoutingSample, ...] = field(repr=False)
    """Every call, in the order of the trace."""
    times: CallTimes | None = field(repr=False)
    busy_us: Mapping[SampleKey, float] = field(repr=False)
    """Device time of each router call."""

    def router(self, site: str) -> RouterSummary:
        """The router of that label or module path.

        Raises:
            KeyError: there is none.
        """
        for router in self.routers:
            if site in (router.info.site, router.info.name):
                return router
        raise KeyError(f"no router {site!r}; there are {[r.info.site for r in self.routers]}")

    def which_layer_is_most_uneven(self) -> RouterSummary | None:
        """The router with the largest load max÷mean; None where nothing was assigned."""
        loaded = [r for r in self.routers if r.load.max_over_mean is not None]
        return max(loaded, key=lambda r: r.load.max_over_mean or 0.0, default=None)

    def which_experts_are_dead(self) -> dict[str, tuple[int, ...]]:
        """Label -> ids of the experts that no token chose."""
        return {r.info.site: r.load.dead_experts for r in self.routers if r.load.dead_experts}

    def how_much_of_the_model_is_moe(self) -> float | None:
        """Share of all work in the trace; None where the trace does not tell."""
        return self.phases.whole.moe_share_of_model if self.phases is not None else None

    def to_dataframe(self) -> Any:
        """One row per router call, as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        from moe_trace.reading.rows import call_rows

        return pandas.DataFrame(call_rows(self))

    def _repr_html_(self) -> str:
        from moe_trace.render.html import render_fragment

        return render_fragment(self)


@dataclass(frozen=True)
class PeakOverride:
    """What the user knows better than the table of devices."""

    tflops: float | None = None
    gb_per_s: float | None = None


@dataclass(frozen=True)
class _Read:
    """One trace, reduced as far as possible, so that the events of the next can take its memory."""

    recording: Recording
    times: CallTimes
    busy_us: dict[SampleKey, float]
    around: Surroundings
    devices: tuple[str, ...]
    operators: frozenset[str]
    unreadable: int


def analyse(
    files: Sequence[Path],
    *,
    label: str,
    chosen: Filter | None = None,
    peak: PeakOverride | None = None,
    progress: Progress | None = None,
) -> TraceSummary:
    """Read the traces one after another and answer for all of them together.

    Raises:
        TraceFileError: a file cannot be read, or the files are of different models.
        UsageError: the filters leave nothing.
    """
    chosen, peak = chosen or Filter(), peak or PeakOverride()
    reads: list[_Read] = []
    calls: dict[str, int] = {}
    for file in files:
        reads.append(_reduce(read_trace(file, progress), chosen, calls, renumber=len(files) > 1))
    recording = _combined([r.recording for r in reads], label)
    # Each file may lack what the filters ask for, but not all of them.
    recording = chosen.apply(recording)
    times = _joined([r.times for r in reads])
    around = _around(reads)
    busy = {key: value for r in reads for key, value in r.busy_us.items()}
    notes = _notes(reads)
    summary = summarize(recording, trace=label, device_busy_us=busy, notes=notes)
    devices = tuple(dict.fromkeys(device for r in reads for device in r.devices))
    phases = report_phases(times, around, model_known=not chosen.stages)
    dtype = recording.model.get("dtype")
    top = find_peak(
        devices, dtype if isinstance(dtype, str) else None, tflops=peak.tflops, gb_per_s=peak.gb_per_s
    )
    speed = report_speed(times, recording.routers, recording.model, top, devices)
    imbalance = imbalance_costs(times, recording.routers)
    operators = frozenset().union(*(r.operators for r in reads))
    return TraceSummary(
        **{name: getattr(summary, name) for name in Summary.__dataclass_fields__},
        files=tuple(str(file) for file in files),
        phases=phases,
        speed=speed,
        imbalance=imbalance,
        findings=find(
            Evidence(
                routers=summary.routers, phases=phases, speed=speed, imbalance=imbalance, operators=operators
            )
        ),
        samples=recording.samples,
        times=times,
        busy_us=busy,
    )


def _reduce(trace: TraceFile, chosen: Filter, calls: dict[str, int], *, renumber: bool) -> _Read:
    recording = trace.recording
    if renumber:
        recording = _renumbered(recording, calls)
    taken = recording
    if chosen:
        names = {r.name for r in recording.routers if chosen.takes_router(r)}
        samples = tuple(s for s in recording.samples if s.name in names and chosen.takes_sample(s))
        taken = replace(recording, samples=samples)
    kernels = find_kernels(trace.events)
    return _Read(
        recording=recording,
        times=measure_calls(taken.samples, trace.events, kernels),
        busy_us=router_busy_us(taken.samples, trace.events, kernels),
        around=surroundings(trace.events, kernels, steps=chosen.steps),
        devices=trace.devices,
        operators=frozenset(trace.events.names),
        unreadable=trace.events.unreadable,
    )


def _renumbered(recording: Recording, calls: dict[str, int]) -> Recording:
    """Call numbers that go on from the files before: each file's own may start again at 0."""
    samples = []
    for sample in recording.samples:
        number = calls.get(sample.name, 0)
        calls[sample.name] = number + 1
        samples.append(replace(sample, call=number))
    return replace(recording, samples=tuple(samples))


def _combined(recordings: Sequence[Recording], label: str) -> Recording:
    first = recordings[0]
    if len(recordings) == 1:
        return first
    routers: dict[str, RouterInfo] = {}
    for recording in recordings:
        for router in recording.routers:
            known = routers.setdefault(router.name, router)
            if (known.num_experts, known.site) != (router.num_experts, router.site):
                raise TraceFileError(
                    f"{label}: the traces are of different models ({router.name} has {known.num_experts} and "
                    f"{router.num_experts} experts); give one of the files"
                )
    return replace(
        first,
        routers=tuple(routers.values()),
        samples=tuple(s for r in recordings for s in r.samples),
        lost=_lost([r.lost for r in recordings], {s.name for r in recordings for s in r.samples}),
    )


def _lost(losses: Sequence[Lost], called: set[str]) -> Lost:
    never = dict.fromkeys(name for lost in losses for name in lost.never_called if name not in called)
    return Lost(
        samples_without_range=sum(lost.samples_without_range for lost in losses),
        ranges_without_sample=sum(lost.ranges_without_sample for lost in losses),
        overwritten=sum(lost.overwritten for lost in losses),
        misread={name: why for lost in losses for name, why in lost.misread.items()},
        never_called=tuple(never),
    )


def _joined(parts: Sequence[CallTimes]) -> CallTimes:
    if len(parts) == 1:
        return parts[0]
    columns = ("block_host_ns", "host_gap_ns", "device_span_ns", "device_gap_ns", "device_overlap_ns")
    backward = [p.backward for p in parts]
    return CallTimes(
        samples=tuple(s for p in parts for s in p.samples),
        forward=_joined_times([p.forward for p in parts]),
        backward=None
        if all(b is None for b in backward)
        else _joined_times([b or _no_times(p) for b, p in zip(backward, parts, strict=True)]),
        on_device=any(p.on_device for p in parts),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in columns},
    )


def _joined_times(parts: Sequence[Times]) -> Times:
    names = Times.__dataclass_fields__
    return Times(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def _no_times(part: CallTimes) -> Times:
    return Times(**{name: np.zeros_like(part.forward.host_ns) for name in Times.__dataclass_fields__})


def _around(reads: Sequence[_Read]) -> Surroundings:
    work = [r.around.model_work_us for r in reads]
    steps = [r.around.step_us for r in reads]
    return Surroundings(
        None if any(w is None for w in work) else sum(w for w in work if w is not None),
        None if any(s is None for s in steps) else sum(s for s in steps if s is not None),
    )


def _notes(reads: Sequence[_Read]) -> list[str]:
    notes = []
    unreadable = sum(r.unreadable for r in reads)
    if unreadable:
        notes.append(
            f"{unreadable} events of the trace could not be read (odd times or broken text) and are left out"
        )
    ranks = {r.recording.rank for r in reads}
    if len(ranks) > 1:
        notes.append(
            f"{len(reads)} traces of {len(ranks)} ranks are added up; under expert parallelism every rank's "
            "router sees the same tokens, which then count once per rank"
        )
    placed = sum(len(r.times.samples) for r in reads)
    if not placed and any(r.recording.samples for r in reads):
        notes.append("no call has its ranges in the trace, so there are no phases and no device times")
    return notes
