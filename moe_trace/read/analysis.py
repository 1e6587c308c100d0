"""Analyse one or several traces together: a summary with phases, speed, imbalance costs and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_trace.data.calls.stages import stages_of
from moe_trace.data.calls.table import CallTable
from moe_trace.data.data_frame import data_frame
from moe_trace.data.errors import deprecated
from moe_trace.data.load_stats import most_uneven
from moe_trace.data.schema import Recording, RoutingSample, Stage
from moe_trace.data.summary import RouterSummary, SampleKey, Summary, summarize
from moe_trace.read.experts.distinct import report_distinct
from moe_trace.read.experts.physical import PhysicalReport, report_physical
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.opening import Progress
from moe_trace.read.findings.finding import Evidence, Finding
from moe_trace.read.findings.rules import find, find_apart
from moe_trace.read.ranks.inputs import RankInput, Ranks
from moe_trace.read.reduced.combine import combined, notes_alone, notes_of, read_all
from moe_trace.read.reduced.trace import ReducedTrace
from moe_trace.read.time.call_times import joined
from moe_trace.read.time.imbalance import Imbalance, imbalance_costs
from moe_trace.read.time.layers import PhaseReport, report_phases
from moe_trace.read.time.outside_moe import total_work
from moe_trace.read.time.peaks import Peak, PeakOverride, find_peak
from moe_trace.read.time.phases import CallTimes
from moe_trace.read.time.speed import SpeedReport, report_speed

if TYPE_CHECKING:
    from moe_trace.read.ranks.report import RankReport


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TraceSummary(Evidence):
    """A `Summary` of a trace or a folder of traces, with results that only the trace itself can provide."""

    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    samples: Sequence[RoutingSample] = field(repr=False)
    """All calls, in the order of the trace."""
    times: CallTimes | None = field(repr=False)
    busy_us: Mapping[SampleKey, float] = field(repr=False)
    """Device time of each router call in microseconds."""
    rank_inputs: tuple[RankInput, ...] = field(default=(), repr=False)
    """Each rank's input to a report, so that traces read one by one can be reported together."""
    physical: PhysicalReport | None = None
    """Load of each physical slot of a load balancer (EPLB)."""
    experts_are_split: bool = False
    """Whether each rank computes other slots than its routers assigned, or parts of them."""
    stages: Mapping[Stage, TraceSummary] = field(default_factory=dict, repr=False)
    """Summary of each stage, as a filter by stage would give it, if the calls have several stages. Figures
    for all stages together then average calls that have little in common. Prefill and decode include their
    parts of mixed calls, without the time, which is that of the whole call and stays in `mixed`."""

    def by_stage(self) -> dict[Stage, TraceSummary]:
        """Return the summary of each stage, in the order of `STAGES`; a single stage maps to `self`."""
        if self.stages:
            return dict(self.stages)
        return {self.stage: self} if self.stage is not None else {}

    def findings_apart(self) -> dict[str, tuple[Finding, ...]]:
        """Group findings by stage, with those about the whole run (or all, without stages) under `""`."""
        of_run = tuple(finding for finding in self.findings if finding.stage is None)
        reported_rules = {finding.rule for finding in of_run}
        found: dict[str, tuple[Finding, ...]] = {
            stage: tuple(finding for finding in part.findings if finding.rule not in reported_rules)
            for stage, part in self.stages.items()
        }
        return {**found, "": of_run}

    @property
    def breakdown(self) -> PhaseReport | None:
        """Time of the MoE layers by phase; the newer name of `phases`."""
        return self.phases

    @property
    def calls(self) -> CallTable:
        """The samples as a table of columns."""
        return CallTable.of(self.samples)

    def router(self, site: str) -> RouterSummary:
        """Return the router with this label or module path.

        Raises:
            KeyError: There is none.
        """
        for router in self.routers:
            if site in (router.info.site, router.info.name):
                return router
        raise KeyError(f"no router {site!r}; there are {[r.info.site for r in self.routers]}")

    def most_imbalanced_layer(self) -> RouterSummary | None:
        """Return the router whose load is most uneven beyond chance (`Chance.cv_beyond`), the first of
        several that tie; None where no load is more uneven than uniform routing of the same tokens."""
        worst = most_uneven([router.chance for router in self.routers])
        return self.routers[worst[0]] if worst else None

    def dead_experts(self) -> dict[str, tuple[int, ...]]:
        """Return the ids of experts that no token chose, by router label, where there are enough tokens."""
        return {
            r.info.site: r.load.dead_experts
            for r in self.routers
            if r.load.dead_experts and r.chance.tells_dead
        }

    @property
    def moe_time_fraction(self) -> float | None:
        """Share of all work in the trace that is MoE, or None if the trace cannot provide it."""
        return self.phases.whole.moe_share_of_model if self.phases is not None else None

    def which_layer_is_most_uneven(self) -> RouterSummary | None:
        """Return `most_imbalanced_layer()`; deprecated name."""
        deprecated("which_layer_is_most_uneven()", "most_imbalanced_layer()")
        return self.most_imbalanced_layer()

    def which_experts_are_dead(self) -> dict[str, tuple[int, ...]]:
        """Return `dead_experts()`; deprecated name."""
        deprecated("which_experts_are_dead()", "dead_experts()")
        return self.dead_experts()

    def how_much_of_the_model_is_moe(self) -> float | None:
        """Return `moe_time_fraction`; deprecated name."""
        deprecated("how_much_of_the_model_is_moe()", "moe_time_fraction")
        return self.moe_time_fraction

    def to_dataframe(self) -> Any:
        """Return one row per router call as a pandas DataFrame; `attrs["columns"]` defines each column.

        Raises:
            MissingPackage: pandas is not installed.
        """
        from moe_trace.read.rows import COLUMNS, call_rows

        return data_frame(call_rows(self.samples, self.times, self.busy_us), COLUMNS, "to_dataframe()")


def analyse(
    files: Sequence[Path],
    *,
    label: str,
    chosen: Filter | None = None,
    peak: PeakOverride | None = None,
    progress: Progress | None = None,
) -> TraceSummary:
    """Read the traces one after another and summarise them together, and each stage separately.

    Raises:
        TraceFileError: A file cannot be read, or the files are of different models.
        UsageError: The filters leave nothing.
    """
    chosen = chosen or Filter()
    reads = read_all(files, progress)
    traces = _Traces(reads, combined(reads, label), label, peak or PeakOverride())
    whole = traces.with_distinct(traces.answer(chosen), chosen)
    stages_found = stages_of(whole.calls)
    if len(stages_found) < 2 or "mixed" in chosen.stages:
        return whole
    stages = {stage: traces.answer(replace(chosen, stages=frozenset([stage]))) for stage in stages_found}
    shown_in = next((stage for stage in ("decode", "mixed") if stage in stages), None)
    stages = {
        stage: replace(part, distinct=whole.distinct) if stage == shown_in else part
        for stage, part in stages.items()
    }
    findings = find_apart(whole, {stage: part.findings for stage, part in stages.items()})
    return replace(whole, stage=None, stages=stages, findings=findings)


@dataclass(frozen=True, eq=False)
class _Traces:
    """All traces as read, before any filter."""

    reads: Sequence[ReducedTrace]
    recording: Recording
    label: str
    peak: PeakOverride

    def answer(self, chosen: Filter) -> TraceSummary:
        """Summarise the chosen calls.

        Raises:
            UsageError: There are none.
        """
        # A single file may lack the calls that the filters select, but not all files may.
        recording = chosen.apply(self.recording)
        reads = [read.narrow(chosen) for read in self.reads]
        times = joined([r.times for r in reads])
        busy = {key: value for r in reads for key, value in r.busy_us.items()}
        ranks_together = Ranks.of([read.rank_input for read in reads])
        ranks = _rank_report(ranks_together, reads)
        split = any(r.recording.experts_are_split for r in reads)
        stages = set(recording.calls.stage.tolist())
        notes = [
            *notes_of(reads),
            *(ranks.notes if ranks is not None else notes_alone(recording)),
        ]
        summary = summarize(recording, trace=self.label, device_busy_us=busy, notes=notes)
        imbalance = _imbalance(reads, ranks_together, times, recording, split)
        found = TraceSummary(
            **{name: getattr(summary, name) for name in Summary.__dataclass_fields__},
            files=tuple(str(read.path) for read in reads),
            stage=stages.pop() if len(stages) == 1 else None,
            phases=report_phases(times, total_work([r.work.of(chosen) for r in reads])),
            speed=self._speed(times, recording, split),
            imbalance=imbalance.layers,
            load_models=imbalance.models,
            operators=frozenset().union(*(r.operators for r in reads)),
            findings=(),
            samples=recording.samples,
            times=times,
            busy_us=busy,
            ranks=ranks,
            rank_inputs=ranks_together.inputs,
            experts_are_split=split,
            physical=report_physical(recording, ranks_together.records),
        )
        return replace(found, findings=find(found))

    def with_distinct(self, answered: TraceSummary, chosen: Filter) -> TraceSummary:
        """Add the distinct experts per forward; a forward that prefills and decodes counts all its tokens."""
        forwards = chosen.of_whole_forwards()
        records = Ranks.of(answered.rank_inputs).records
        times = joined([read.narrow(forwards).times for read in self.reads])
        found = report_distinct(forwards.apply(self.recording), records, times, self._peak.bytes_per_s)
        answered = replace(answered, distinct=found)
        return replace(answered, findings=find(answered))

    def _speed(self, times: CallTimes, recording: Recording, split: bool) -> SpeedReport | None:
        return report_speed(
            times, recording.routers, recording.model, self._peak, self._devices, experts_are_split=split
        )

    @property
    def _devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(device for r in self.reads for device in r.devices))

    @property
    def _peak(self) -> Peak:
        dtype = self.recording.model.get("dtype")
        return find_peak(self._devices, dtype if isinstance(dtype, str) else None, self.peak)


def _rank_report(ranks: Ranks, reads: Sequence[ReducedTrace]) -> RankReport | None:
    """Return None for a single rank, without importing what only several ranks need."""
    if len(ranks.by_rank) < 2:
        return None
    from moe_trace.read.ranks.report import report_ranks

    return report_ranks(ranks, known=reads[0].alignment)


def _imbalance(
    reads: Sequence[ReducedTrace], ranks: Ranks, times: CallTimes, recording: Recording, split: bool
) -> Imbalance:
    """Compute the cost of imbalance per layer, on its device or across the ranks that share the experts."""
    if split and len(ranks.inputs) == len(reads) > 1:
        from moe_trace.read.ranks.imbalance import rank_imbalance

        return rank_imbalance(ranks, {r.recording.rank: r.times for r in reads})
    return imbalance_costs(times, recording.routers, experts_are_split=split)
