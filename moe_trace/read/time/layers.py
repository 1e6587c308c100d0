"""Sum phases per layer and over all layers, as shares of MoE, of the step and of the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.display.notebook import ShortRepr
from moe_trace.data.trace_json.coverage import Provenance
from moe_trace.read.time.outside_moe import TraceTotals
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.read.time.phases import CallTimes, IntArray, Times

Pass = Literal["forward", "recompute", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "recompute", "backward")


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Time of one phase over all calls of a layer, in microseconds."""

    host_us: float
    """Time in operators."""
    device_busy_us: float | None
    """Sum of its kernels; None on a CPU."""
    device_span_us: float | None
    """First to last kernel of the phase, summed over calls."""
    kernels: int | None
    """Number of kernels, or None on a device with unknown times."""
    share_of_moe: float | None
    """Share of the work of all MoE layers in the same pass: forward, recompute or backward."""
    share_of_model: float | None
    """Share of all device work in the trace (on a CPU: of all time in operators)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockTime(ShortRepr):
    """Sums over the MoE blocks of some calls, in microseconds.

    `block_host_us` = the phases' `host_us` + `host_gap_us`; `device_span_us` = the phases' `device_busy_us` +
    `device_gap_us` - `device_overlap_us`.
    """

    calls: int
    block_host_us: float
    host_gap_us: float
    device_span_us: float | None
    device_busy_us: float | None
    device_gap_us: float | None
    device_overlap_us: float | None
    forward: dict[str, PhaseTime]


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerPhases(BlockTime):
    """One router's MoE layer, with separate sums over its forward calls, recomputed calls and backwards.

    A mean divides each by its own number: `forward` by `calls`, `recompute.forward` by `recompute.calls`,
    `backward` by `backwards`.
    """

    site: str
    """Label of the router, or `all` for the sum over layers."""
    name: str | None
    recompute: BlockTime | None
    """Calls that gradient checkpointing ran again, or None if there are none."""
    backwards: int
    """Number of calls whose backward is in the trace."""
    backward: dict[str, PhaseTime] | None

    def count(self, part: Pass) -> int:
        """Return the number of calls that a mean over this pass divides by."""
        if part == "recompute":
            return self.recompute.calls if self.recompute is not None else 0
        return self.backwards if part == "backward" else self.calls

    def phases_of(self, part: Pass) -> dict[str, PhaseTime] | None:
        """Return the phases of one pass, or None if the trace lacks it."""
        if part == "recompute":
            return self.recompute.forward if self.recompute is not None else None
        return self.backward if part == "backward" else self.forward


@dataclass(frozen=True, kw_only=True)
class ModelTotals:
    """Totals that MoE is a share of. Work is device busy time, or time in operators on a CPU."""

    on_device: bool
    """Whether work is device time; also False if a device's times are unknown."""
    host_known: bool
    """Whether host times cover all calls; they miss calls that ran on a device inside compiled code."""
    moe_work_us: float | None
    """Work of forward, recomputed and backward calls, or None if the device's times are unknown."""
    model_work_us: float | None
    """None if the rest of the model cannot be separated for the chosen steps and stages."""
    model_forward_us: float | None
    """The model's work outside its backward and its optimizer."""
    model_backward_us: float | None
    """The model's work inside autograd's nodes, including recomputed forwards; 0 without a backward."""
    step_us: float | None
    """Host time of the profiler's steps; None without `prof.step()`."""
    moe_share_of_model: float | None
    moe_share_of_forward: float | None
    """Share of MoE's forward calls in the model's forward."""
    moe_share_of_backward: float | None
    """Share of MoE's recomputed calls and backwards in the model's backward; None without one."""
    moe_share_of_step: float | None
    """Host time of the blocks (also recomputed) over that of the steps; None unless known for all calls."""


@dataclass(frozen=True, kw_only=True, repr=False)
class PhaseReport(ShortRepr):
    """Time of the MoE layers by phase."""

    layers: tuple[LayerPhases, ...]
    total: LayerPhases
    whole: ModelTotals
    steps: int
    """Number of steps of the calls."""
    tokens: int
    """Tokens of the forward calls, counted in the layer that saw most."""
    provenance: Provenance | None = None
    """Basis of the times of calls inside compiled code; None without such calls."""

    def passes(self) -> tuple[Pass, ...]:
        """Return the passes in the trace."""
        return tuple(part for part in PASSES if self.total.phases_of(part) is not None)

    def work_us(self, time: PhaseTime) -> float:
        """Return device busy time on a device, else time in operators."""
        return (time.device_busy_us or 0.0) if self.whole.on_device else time.host_us


def report_phases(times: CallTimes, around: TraceTotals) -> PhaseReport | None:
    """Sum the calls, or return None if no call has ranges in the trace."""
    calls = times.samples
    if not len(calls):
        return None
    measure = _Measure.of(times, around.model_work_us)
    keys = [calls.keys[router] for router in sorted(set(calls.router.tolist()))]
    layers = tuple(
        measure.layer(calls.of_router(key.name), key.site, key.name)
        for key in sorted(keys, key=lambda key: (key.layer, key.site))
    )
    work_us = _sum(measure.work_us.values())
    forward_us, backward_us = _model_passes(around) if measure.model_us is not None else (None, None)
    again_us = _sum([measure.work_us["recompute"], measure.work_us["backward"]])
    host_known = not (times.on_device and calls.in_graph.any())
    block_us = int(times.block_host_ns.sum()) / 1000
    tokens = np.bincount(calls.router[calls.forward], weights=calls.tokens[calls.forward])
    return PhaseReport(
        layers=layers,
        total=measure.layer(np.ones(len(calls), bool), "all", None),
        whole=ModelTotals(
            on_device=times.device_known,
            host_known=host_known,
            moe_work_us=work_us,
            model_work_us=measure.model_us,
            model_forward_us=forward_us,
            model_backward_us=backward_us,
            step_us=around.step_us,
            moe_share_of_model=_ratio(work_us, measure.model_us),
            moe_share_of_forward=_ratio(measure.work_us["forward"], forward_us),
            moe_share_of_backward=_ratio(again_us, backward_us),
            moe_share_of_step=_ratio(block_us if host_known else None, around.step_us),
        ),
        steps=len(set(calls.step.tolist())),
        tokens=int(tokens.max(initial=0)),
        provenance=times.coverage.provenance if calls.in_graph.any() else None,
    )


@dataclass(frozen=True, eq=False)
class _Measure:
    """Sums of calls, as shares of all MoE work of the same pass and of the model's work."""

    times: CallTimes
    work_us: dict[Pass, float | None]
    """None if the device's times, or the links of the backward, are unknown."""
    model_us: float | None

    @classmethod
    def of(cls, times: CallTimes, model_us: float | None) -> _Measure:
        def work_us(part: Times | None, rows: npt.NDArray[np.bool_]) -> float | None:
            work_ns = times.work_ns(part) if part is not None else None
            return None if work_ns is None else int(work_ns[rows].sum()) / 1000

        forward = times.samples.forward
        work: dict[Pass, float | None] = {
            "forward": work_us(times.forward, forward),
            "recompute": work_us(times.forward, ~forward),
            "backward": work_us(times.backward, np.ones(len(forward), bool)),
        }
        if times.backward is None and times.coverage.backward.known:
            work["backward"] = 0.0
        return cls(times, work, model_us if work["forward"] is not None else None)

    def layer(self, mine: npt.NDArray[np.bool_], site: str, name: str | None) -> LayerPhases:
        first = self.times.samples.forward
        forward, recomputed = np.flatnonzero(mine & first), np.flatnonzero(mine & ~first)
        times, backward = self.times.backward, None
        backwards = 0
        if times is not None:
            backward = self._phases(times, np.flatnonzero(mine), "backward")
            backwards = int(times.ran[mine].sum())
        return LayerPhases(
            site=site,
            name=name,
            recompute=BlockTime(**self._block(recomputed, "recompute")) if len(recomputed) else None,
            backwards=backwards,
            backward=backward,
            **self._block(forward, "forward"),
        )

    def _block(self, rows: IntArray, part: Pass) -> dict[str, Any]:
        times, device = self.times, self.times.device_known

        def total(column: IntArray) -> float:
            return int(column[rows].sum()) / 1000

        return {
            "calls": len(rows),
            "block_host_us": total(times.block_host_ns),
            "host_gap_us": total(times.host_gap_ns),
            "device_span_us": total(times.device_span_ns) if device else None,
            "device_busy_us": total(times.forward.busy_ns) if device else None,
            "device_gap_us": total(times.device_gap_ns) if device else None,
            "device_overlap_us": total(times.device_overlap_ns) if device else None,
            "forward": self._phases(times.forward, rows, part),
        }

    def _phases(self, times: Times, rows: IntArray, part: Pass) -> dict[str, PhaseTime]:
        device = self.times.device_known
        known = device or not self.times.on_device
        host, busy = times.host_ns[rows].sum(0), times.busy_ns[rows].sum(0)
        span, kernels = times.span_ns[rows].sum(0), times.kernels[rows].sum(0)
        work = busy if device else host
        return {
            phase: PhaseTime(
                host_us=int(host[i]) / 1000,
                device_busy_us=int(busy[i]) / 1000 if device else None,
                device_span_us=int(span[i]) / 1000 if device else None,
                kernels=int(kernels[i]) if known else None,
                share_of_moe=_ratio(int(work[i]) / 1000, self.work_us[part]),
                share_of_model=_ratio(int(work[i]) / 1000, self.model_us),
            )
            for i, phase in enumerate(PHASES)
        }


def _sum(parts: Iterable[float | None]) -> float | None:
    known = list(parts)
    return None if None in known else sum(part for part in known if part is not None)


def _model_passes(around: TraceTotals) -> tuple[float | None, float | None]:
    model, backward, optimizer = around.model_work_us, around.backward_work_us, around.optimizer_work_us
    if model is None or backward is None or optimizer is None:
        return None, None
    return model - backward - optimizer, backward


def _ratio(part: float | None, total: float | None) -> float | None:
    return part / total if part is not None and total else None
