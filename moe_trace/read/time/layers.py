"""Phases added up per layer and over all layers, as shares of MoE, of the step and of the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.read.time.phases import CallTimes, IntArray, Times
from moe_trace.read.time.structure import PHASES
from moe_trace.read.time.surroundings import Surroundings


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """One phase over all calls of a layer, in microseconds."""

    host_us: float
    """Time in operators."""
    device_busy_us: float | None
    """Sum of its kernels; None on a CPU."""
    device_span_us: float | None
    """First to last kernel of the phase, summed over calls."""
    kernels: int | None
    """None on a device whose times are not known."""
    share_of_moe: float | None
    """Of the forward or backward work of all MoE layers."""
    share_of_model: float | None
    """Of all device work in the trace (on a CPU: of all time in operators)."""


@dataclass(frozen=True, kw_only=True)
class LayerPhases:
    """One router's MoE layer over all its calls, in microseconds.

    `block_host_us` = the phases' `host_us` + `host_gap_us`; `device_span_us` = the phases'
    `device_busy_us` + `device_gap_us` - `device_overlap_us`.
    """

    site: str
    """`all` for the sum over layers."""
    name: str | None
    calls: int
    block_host_us: float
    host_gap_us: float
    device_span_us: float | None
    device_busy_us: float | None
    device_gap_us: float | None
    device_overlap_us: float | None
    forward: dict[str, PhaseTime]
    backward: dict[str, PhaseTime] | None


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What the MoE layers are part of. Work is device busy time, on a CPU time in operators."""

    on_device: bool
    """Whether these are device times; False too where a device's times are not known."""
    moe_work_us: float | None
    """Forward and backward; None where the device's times are not known."""
    model_work_us: float | None
    """None where the rest of the model cannot be told apart by the chosen steps and stages."""
    step_us: float | None
    """Host time of the profiler's steps; None without `prof.step()`."""
    moe_share_of_model: float | None
    moe_share_of_step: float | None
    """Host time of the blocks (forward) over that of the steps."""


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """Where the time of the MoE layers goes."""

    layers: tuple[LayerPhases, ...]
    total: LayerPhases
    whole: Whole


def report_phases(times: CallTimes, around: Surroundings) -> PhaseReport | None:
    """Add the calls up; None where no call has ranges in the trace."""
    if not len(times.samples):
        return None
    forward_us = _work_us(times, times.forward)
    backward_us: float | None = 0.0 if times.coverage.backward.known else None
    if times.backward is not None:
        backward_us = _work_us(times, times.backward)
    model_us = around.model_work_us if forward_us is not None else None
    denominators = _Denominators(forward_us, backward_us, model_us)
    keys = [times.samples.keys[router] for router in np.unique(times.samples.router).tolist()]
    layers = [
        _layer(times, np.flatnonzero(times.samples.of_router(key.name)), key.site, key.name, denominators)
        for key in sorted(keys, key=lambda key: (key.layer, key.site))
    ]
    work_us = None if forward_us is None or backward_us is None else forward_us + backward_us
    block_us = int(times.block_host_ns.sum()) / 1000
    return PhaseReport(
        layers=tuple(layers),
        total=_layer(times, np.arange(len(times.samples)), "all", None, denominators),
        whole=Whole(
            on_device=times.device_known,
            moe_work_us=work_us,
            model_work_us=model_us,
            step_us=around.step_us,
            moe_share_of_model=_ratio(work_us, model_us),
            moe_share_of_step=_ratio(block_us, around.step_us),
        ),
    )


@dataclass(frozen=True)
class _Denominators:
    forward_us: float | None
    backward_us: float | None
    model_us: float | None


def _layer(times: CallTimes, rows: IntArray, site: str, name: str | None, of: _Denominators) -> LayerPhases:
    device, known = times.device_known, times.device_known or not times.on_device

    def total(column: IntArray) -> float:
        return int(column[rows].sum()) / 1000

    backward = None
    if times.backward is not None:
        backward = _phases(times.backward, rows, device, known, of.backward_us, of.model_us)
    return LayerPhases(
        site=site,
        name=name,
        calls=len(rows),
        block_host_us=total(times.block_host_ns),
        host_gap_us=total(times.host_gap_ns),
        device_span_us=total(times.device_span_ns) if device else None,
        device_busy_us=total(times.forward.busy_ns) if device else None,
        device_gap_us=total(times.device_gap_ns) if device else None,
        device_overlap_us=total(times.device_overlap_ns) if device else None,
        forward=_phases(times.forward, rows, device, known, of.forward_us, of.model_us),
        backward=backward,
    )


def _phases(
    times: Times,
    rows: IntArray,
    device: bool,
    known: bool,
    moe_us: float | None,
    model_us: float | None,
) -> dict[str, PhaseTime]:
    host, busy = times.host_ns[rows].sum(0), times.busy_ns[rows].sum(0)
    span, kernels = times.span_ns[rows].sum(0), times.kernels[rows].sum(0)
    work = busy if device else host
    return {
        phase: PhaseTime(
            host_us=int(host[i]) / 1000,
            device_busy_us=int(busy[i]) / 1000 if device else None,
            device_span_us=int(span[i]) / 1000 if device else None,
            kernels=int(kernels[i]) if known else None,
            share_of_moe=_ratio(int(work[i]) / 1000, moe_us),
            share_of_model=_ratio(int(work[i]) / 1000, model_us),
        )
        for i, phase in enumerate(PHASES)
    }


def _work_us(times: CallTimes, part: Times) -> float | None:
    work_ns = times.work_ns(part)
    return None if work_ns is None else int(work_ns.sum()) / 1000


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
