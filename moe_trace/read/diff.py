"""What changed between two recordings, told apart from noise by a bootstrap.

Calls are resampled with replacement, each side on its own. A quantile's bootstrap distribution needs no
resampling: the i-th smallest of n draws is at the Beta(i, n - i + 1) quantile of the sample (Efron 1979;
David and Nagaraja, Order Statistics, section 2.2). A change counts as one if the 99 % interval of the
difference leaves out 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.data.loads import Load, describe_load
from moe_trace.data.schema import RoutingSample
from moe_trace.data.summary import host_us
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.bootstrap import RESAMPLES, resampled_sums
from moe_trace.read.time.phases import CallTimes
from moe_trace.read.time.structure import EXPERTS, PHASES

LEVEL = 0.99
"""Of a hundred metrics that did not change, one is called changed."""
CALLS_MIN = 5
Verdict = Literal["same", "changed", "noise", "few calls"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one layer (`all` for all layers) in A and in B."""

    site: str
    metric: str
    a: float
    b: float
    low: float | None
    """99 % interval of b - a; None with too few calls."""
    high: float | None
    verdict: Verdict

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a

    @property
    def relative(self) -> float | None:
        """(b - a) / a."""
        return self.difference / abs(self.a) if self.a else None


@dataclass(frozen=True)
class _Side:
    """One router's calls of one side, or all calls."""

    samples: Sequence[RoutingSample]
    times: CallTimes | None
    rows: Sequence[int]
    """Rows of `times` that belong to the samples."""
    busy_us: Sequence[float]


# -- metrics ------------------------------------------------------------------------------------------

Values = Callable[[_Side], np.ndarray]


def _work(phase: int) -> Values:
    def values(side: _Side) -> np.ndarray:
        if side.times is None or not len(side.rows):
            return np.zeros(0)
        work_ns = side.times.work_ns(side.times.forward)
        return np.zeros(0) if work_ns is None else work_ns[side.rows, phase] / 1000

    return values


def _span(side: _Side) -> np.ndarray:
    found = [s.placement.device.get("router") for s in side.samples if s.placement is not None]
    return np.array([span.duration_us for span in found if span is not None])


def _block(side: _Side) -> np.ndarray:
    if side.times is None or not len(side.rows):
        return np.zeros(0)
    if side.times.on_device and not side.times.device_known:
        return np.zeros(0)
    column = side.times.device_span_ns if side.times.on_device else side.times.block_host_ns
    return column[side.rows] / 1000


def _flops_per_s(side: _Side) -> np.ndarray:
    if side.times is None or not len(side.rows):
        return np.zeros(0)
    worked = side.times.work_ns(side.times.forward)
    if worked is None:
        return np.zeros(0)
    work_ns = worked[side.rows, EXPERTS]
    flops = np.array([side.times.samples[row].expert_flops for row in side.rows], np.float64)
    known = (work_ns > 0) & (flops > 0)
    return flops[known] / work_ns[known] * 1e9


QUANTILES: dict[str, tuple[Values, float]] = {
    "host_p50": (lambda side: np.array([host_us(s) for s in side.samples]), 0.5),
    "host_p95": (lambda side: np.array([host_us(s) for s in side.samples]), 0.95),
    "device_span_p50": (_span, 0.5),
    "device_busy_p50": (lambda side: np.array(side.busy_us), 0.5),
    "device_busy_p95": (lambda side: np.array(side.busy_us), 0.95),
    "block_p50": (_block, 0.5),
    **{f"{phase}_p50": (_work(i), 0.5) for i, phase in enumerate(PHASES)},
    "experts_flops_p50": (_flops_per_s, 0.5),
}
MEANS = ("router_entropy", "confidence")
LOADS = ("max_over_mean", "cv", "gini", "entropy")
METRICS = (*(f"load_{name}" for name in LOADS), *MEANS, *QUANTILES)


# -- comparing ----------------------------------------------------------------------------------------


def compare(a: TraceSummary, b: TraceSummary, *, only: str | None = None) -> list[Change]:
    """Every metric that both sides have, for each router of both and for all together.

    Args:
        only: a router's label, or `all`: nothing else is computed.

    Raises:
        UsageError: no router is in both.
    """
    names_b = {router.info.name for router in b.routers}
    shared = [router.info for router in a.routers if router.info.name in names_b]
    if not shared:
        raise UsageError("the two recordings share no router: they are of different models")
    changes = []
    names = frozenset(info.name for info in shared)
    for site, chosen in [("all", names), *((info.site, frozenset([info.name])) for info in shared)]:
        if only is None or site == only:
            changes += _compare_sides(site, _side(a, chosen), _side(b, chosen))
    return changes


def _side(summary: TraceSummary, names: frozenset[str]) -> _Side:
    samples = [s for s in summary.samples if s.name in names and s.phase == "forward"]
    times = summary.times
    rows = []
    if times is not None:
        rows = [i for i, s in enumerate(times.samples) if s.name in names and s.phase == "forward"]
    keys = [(s.name, s.call) for s in samples]
    return _Side(samples, times, rows, [summary.busy_us[k] for k in keys if k in summary.busy_us])


def _compare_sides(site: str, a: _Side, b: _Side) -> list[Change]:
    rng = np.random.default_rng(0)
    found = []
    loads_a, loads_b = (_loads(side, rng) for side in (a, b))
    for name in LOADS:
        found.append(_change(site, f"load_{name}", loads_a[name], loads_b[name]))
    for name in MEANS:
        found.append(_change(site, name, *(_mean(side, name, rng) for side in (a, b))))
    for name, (values, q) in QUANTILES.items():
        found.append(_change(site, name, *(_quantile(values(side), q, rng) for side in (a, b))))
    return [change for change in found if change is not None]


_Estimate = tuple[float, np.ndarray | None] | None
"""A value with its bootstrap distribution; no distribution with too few calls, None without data."""


def _change(site: str, metric: str, a: _Estimate, b: _Estimate) -> Change | None:
    if a is None or b is None:
        return None
    (value_a, draws_a), (value_b, draws_b) = a, b
    low = high = None
    verdict: Verdict
    if draws_a is not None and draws_b is not None:
        low, high = (float(v) for v in np.percentile(draws_b - draws_a, (50 - 50 * LEVEL, 50 + 50 * LEVEL)))
    if value_a == value_b:
        verdict = "same"
    elif low is None or high is None:
        verdict = "few calls"
    else:
        verdict = "noise" if low <= 0 <= high else "changed"
    return Change(site=site, metric=metric, a=value_a, b=value_b, low=low, high=high, verdict=verdict)


def _quantile(values: np.ndarray, q: float, rng: np.random.Generator) -> _Estimate:
    n = len(values)
    if not n:
        return None
    if n < CALLS_MIN:
        return float(np.percentile(values, 100 * q)), None
    ordered = np.sort(values)
    rank = min(n, max(1, round(q * (n - 1)) + 1))
    places = np.minimum(n - 1, (rng.beta(rank, n - rank + 1, RESAMPLES) * n).astype(np.int64))
    return float(np.percentile(values, 100 * q)), ordered[places]


def _mean(side: _Side, name: str, rng: np.random.Generator) -> _Estimate:
    known = [(v, s.tokens - s.nonfinite_tokens) for s in side.samples if (v := getattr(s, name)) is not None]
    if not known:
        return None
    values, weights = np.array(known, np.float64).T
    if not weights.sum():
        return None
    value = float((values * weights).sum() / weights.sum())
    if len(values) < CALLS_MIN:
        return value, None
    total, weighted = resampled_sums(np.stack([weights, values * weights], axis=1), rng).T
    return value, weighted / np.where(total > 0, total, 1)


def _loads(side: _Side, rng: np.random.Generator) -> dict[str, _Estimate]:
    """Load figures of the summed counts, averaged over the layers; calls of a layer are resampled, and all
    figures are of the same resamples.
    """
    by_layer: dict[str, list[np.ndarray]] = {}
    for sample in side.samples:
        by_layer.setdefault(sample.name, []).append(sample.assignments)
    values: list[Load] = []
    draws: dict[str, list[np.ndarray]] = {name: [] for name in LOADS}
    for loads in by_layer.values():
        counts_NE = _stacked(loads)
        value = describe_load(counts_NE.sum(0))
        if value.max_over_mean is None:  # no assignment: none of the figures exists
            continue
        values.append(value)
        if len(loads) >= CALLS_MIN:
            # Floats multiply by BLAS, integers in a plain loop; sums this small are exact in both.
            sums = resampled_sums(counts_NE.astype(np.float64), rng)
            for name in LOADS:
                draws[name].append(_load_figures(sums, name))
    if not values:
        return dict.fromkeys(LOADS)
    complete = len(draws[LOADS[0]]) == len(values)
    return {
        name: (
            float(np.mean([getattr(value, name) for value in values])),
            np.mean(draws[name], axis=0) if complete else None,
        )
        for name in LOADS
    }


def _stacked(loads: Sequence[np.ndarray]) -> np.ndarray:
    """[N, E]; shorter ones end in zeros."""
    experts = max(map(len, loads))
    return np.stack([c if len(c) == experts else np.pad(c, (0, experts - len(c))) for c in loads])


def _load_figures(counts_BE: np.ndarray, name: str) -> np.ndarray:
    """[B] the figures of `describe_load` for many loads at once."""
    loads = np.where(counts_BE.sum(1, keepdims=True) > 0, counts_BE, 1).astype(np.float64)
    n = loads.shape[1]
    mean = loads.mean(1)
    if name == "max_over_mean":
        return loads.max(1) / mean
    if name == "cv":
        return loads.std(1) / mean
    if name == "gini":
        ranks = 2 * np.arange(1, n + 1) - n - 1
        return (np.sort(loads, axis=1) * ranks).sum(1) / (n * loads.sum(1))
    shares = loads / loads.sum(1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(1) / np.log(n) if n > 1 else np.ones(len(loads))
