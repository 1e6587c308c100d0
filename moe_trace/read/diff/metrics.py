"""Metrics that are compared, each with its error. One layer is a stratum: metrics of all layers are the mean
of the layers' own, so that differences between layers do not pass for noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.load_stats import describe_load, load_figures
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.diff.resampling import Estimate, Floats, Ints, draw, estimate, resampled_sums, units_of
from moe_trace.read.time.phase_detection import EXPERTS, PHASES

SPREAD_DEVICE, SPREAD_HOST = 0.005, 0.05
"""Relative standard deviation of a time between runs of the same thing, beyond what the steps of one run
show: another placement in memory, another clock rate, other work on the machine (docs/reading.md)."""
HOST_FLOOR = 0.3
"""Relative change of times on the host's clock that runs of the same thing sometimes show, when something
else takes the machine for the length of a run. The spread of steps within two runs cannot reveal it, so the
whole interval must lie beyond it (docs/reading.md)."""


@dataclass(frozen=True)
class Side:
    """Forward calls of one stage of one recording, by router."""

    calls: CallTable
    unit: Ints
    """[N] step, or stretch of steps, of each call."""
    units: int
    drawn: Ints
    """[RESAMPLES, units] one set of resamples for all metrics."""
    columns: dict[str, Floats]
    """Time of each call by metric, [N]; NaN where unknown."""
    host_clock: frozenset[str]
    """Metrics in `columns` that are times on the host."""

    def rows(self, name: str) -> Ints:
        """Return the rows of this router's calls."""
        return np.flatnonzero(self.calls.of_router(name))


# -- times --------------------------------------------------------------------------------------------

QUANTILES = {
    "host_p50": 0.5,
    "host_p95": 0.95,
    "device_span_p50": 0.5,
    "device_busy_p50": 0.5,
    "device_busy_p95": 0.95,
    "block_p50": 0.5,
    **{f"{phase}_p50": 0.5 for phase in PHASES},
    **{f"{phase}_share": 0.5 for phase in PHASES},
    "experts_flops_p50": 0.5,
}
MEANS = ("router_entropy", "confidence")
LOADS = ("max_over_mean", "cv", "gini", "entropy")
METRICS = (*(f"load_{name}" for name in LOADS), *MEANS, *QUANTILES)
_UNITS_FOR_P95 = 20


def side_of(summary: TraceSummary, *, with_times: bool) -> Side:
    """Collect the calls and times of one recording's stage that are compared."""
    calls = summary.calls.take(summary.calls.forward)
    unit, units = units_of(_forwards(calls))
    columns = _times(summary, calls) if with_times else {}
    on_device = summary.times is not None and summary.times.on_device
    host_clock = frozenset(m for m in columns if m.startswith("host") or not on_device)
    return Side(calls, unit, units, draw(max(1, units)), columns, host_clock)


def _forwards(calls: CallTable) -> Ints:
    """Return the forward of each call: its number within its router if all agree in length, else the step."""
    order, counts = np.zeros(len(calls), np.int64), set()
    for router in np.unique(calls.router):
        rows = np.flatnonzero(calls.router == router)
        order[rows] = np.arange(len(rows))
        counts.add(len(rows))
    return order if len(counts) == 1 else calls.step


def _times(summary: TraceSummary, calls: CallTable) -> dict[str, Floats]:
    busy = np.array([summary.busy_us.get(key, np.nan) for key in calls.call_keys()])
    host = calls.host_us()
    host[host <= 0] = np.nan  # calls inside a graph have no separate time on the host
    columns = {
        "host_p50": host,
        "host_p95": host,
        "device_span_p50": calls.duration_us("device", "router"),
        "device_busy_p50": busy,
        "device_busy_p95": busy,
    }
    times = summary.times
    if times is None:
        return columns
    work_ns = times.work_ns(times.forward)
    if work_ns is None:  # some kernels have no launch that ties them to a phase
        return columns
    placed = times.us_in(calls)
    work_us = placed(work_ns)
    columns["block_p50"] = placed(times.device_span_ns if times.on_device else times.block_host_ns)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, phase in enumerate(PHASES):
            columns[f"{phase}_p50"] = work_us[:, i]
            columns[f"{phase}_share"] = work_us[:, i] / work_us.sum(1)
        flops = np.where(calls.expert_flops > 0, calls.expert_flops, np.nan)
        rate = flops / work_us[:, EXPERTS] * 1e6
    columns["experts_flops_p50"] = np.where(np.isfinite(rate), rate, np.nan)
    return columns


# -- estimates ----------------------------------------------------------------------------------------


def estimates(side: Side, routers: Sequence[str]) -> dict[str, list[Estimate | None]]:
    """Return estimates by metric, for all routers together and then for each; None without data."""
    by_metric: dict[str, list[Estimate | None]] = {}
    rows = [side.rows(name) for name in routers]
    for metric in QUANTILES:
        if metric in side.columns:
            parts = [_quantile(side, metric, router_rows) for router_rows in rows]
            spread = SPREAD_HOST if metric in side.host_clock else SPREAD_DEVICE
            by_metric[metric] = _estimates(parts, 0.0 if metric.endswith("_share") else spread)
    for metric in MEANS:
        by_metric[metric] = _estimates([_mean(side, metric, router_rows) for router_rows in rows])
    loads = [_loads(side, router_rows) for router_rows in rows]
    for metric in LOADS:
        by_metric[f"load_{metric}"] = _estimates([router_rows[metric] for router_rows in loads])
    return by_metric


@dataclass(frozen=True)
class _Part:
    """One router's metric, its resamples and its value in each unit."""

    value: float
    draws: Floats
    series: Floats


def _estimates(parts: Sequence[_Part | None], spread: float = 0.0) -> list[Estimate | None]:
    known = [part for part in parts if part is not None]
    all_layers = None
    if known and len(known) == len(parts):  # a mean over fewer layers would be a different metric
        columns = (np.mean([getattr(p, f) for p in known], axis=0) for f in ("value", "draws", "series"))
        all_layers = _Part(*columns)
    return [
        None if p is None else estimate(float(p.value), p.draws, p.series, spread=spread)
        for p in (all_layers, *parts)
    ]


def _quantile(side: Side, metric: str, rows: Ints) -> _Part | None:
    q = QUANTILES[metric]
    values, unit = side.columns[metric][rows], side.unit[rows]
    values, unit = values[~np.isnan(values)], unit[~np.isnan(values)]
    series = _median_by_unit(values, unit, side.units)
    if series is None or not values.any() or (q > 0.5 and side.units < _UNITS_FOR_P95):
        return None
    return _Part(float(np.quantile(values, q)), np.quantile(series[side.drawn], q, axis=1), series)


def _median_by_unit(values: Floats, unit: Ints, units: int) -> Floats | None:
    """Return the median of each unit, or None if one has no value."""
    order = np.lexsort((values, unit))
    counts = np.bincount(unit, minlength=units)
    if not len(values) or not counts.all():
        return None
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    ordered = values[order]
    return (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) / 2


def _mean(side: Side, name: str, rows: Ints) -> _Part | None:
    rows = rows[~np.isnan(side.calls.numbers[name][rows])]
    weights = (side.calls.tokens - side.calls.nonfinite_tokens)[rows].astype(np.float64)
    columns = (weights, weights * side.calls.numbers[name][rows])
    table: Floats = np.stack([np.bincount(side.unit[rows], column, side.units) for column in columns], axis=1)
    if not table[:, 0].all() or not len(rows):
        return None
    sums = resampled_sums(table, side.drawn)
    return _Part(
        float(table[:, 1].sum() / table[:, 0].sum()), sums[:, 1] / sums[:, 0], table[:, 1] / table[:, 0]
    )


def counts_by_unit(side: Side, rows: Ints) -> Floats:
    """Return assignments of one router, [units, E]."""
    counts = side.calls.assignments.take(rows)
    return counts.summed_by(side.unit[rows], side.units, least=1).astype(np.float64)


def _loads(side: Side, rows: Ints) -> dict[str, _Part | None]:
    counts_UE = counts_by_unit(side, rows)
    value = describe_load(counts_UE.sum(0))
    if value.max_over_mean is None:  # without assignments no load metric is defined
        return dict.fromkeys(LOADS)
    resampled, series = map(_figures, (resampled_sums(counts_UE, side.drawn), counts_UE))
    values = (getattr(value, name) for name in LOADS)
    return {name: _Part(*part) for name, *part in zip(LOADS, values, resampled, series, strict=True)}


def _figures(counts_BE: Floats) -> tuple[Floats, ...]:
    """Compute `LOADS` of many loads at once, each [B]; a load without assignments counts as even."""
    return load_figures(np.where(counts_BE.sum(1, keepdims=True) > 0, counts_BE, 1.0))
