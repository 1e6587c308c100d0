"""Resample steps with replacement to estimate the error of a metric.

Calls of one step share its text and its moment, so a step is drawn with all of its calls. Long recordings are
cut into stretches of consecutive steps (batch means; Law, Simulation Modeling and Analysis, section 9.5.3),
which also keeps slow drift together in one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

RESAMPLES = 500
UNITS_MAX = 40
UNITS_MIN = 5
"""Minimum number of steps; fewer reveal nothing about their spread."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A metric with its standard error, estimated from `units` steps; None with too few of them."""

    value: float
    error: float | None
    units: float


def units_of(steps: Sequence[int] | Ints) -> tuple[Ints, int]:
    """Return the unit of each call, and the number of units, which are steps or stretches of steps."""
    distinct, rank = np.unique(np.asarray(steps, dtype=np.int64), return_inverse=True)
    count = len(distinct)
    if count > UNITS_MAX:
        rank = rank * UNITS_MAX // count
    return rank.astype(np.int64), min(count, UNITS_MAX)


def draw(units: int, seed: int = 0) -> Ints:
    """Draw the units of each resample, [RESAMPLES, units]."""
    return np.random.default_rng(seed).integers(0, units, (RESAMPLES, units))


def resampled_sums(columns_UK: Floats, drawn: Ints) -> Floats:
    """Sum the drawn rows, [RESAMPLES, K]; all columns use the same rows."""
    units = drawn.shape[1]
    flat = drawn + np.arange(len(drawn))[:, None] * units
    times = np.bincount(flat.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return times.astype(np.float64) @ columns_UK


def estimate(value: float, draws: Floats, series_U: Floats, *, spread: float = 0.0) -> Estimate:
    """Estimate the error of a metric from its resamples.

    Args:
        series_U: The metric of each unit in order of time. Where neighbours are alike, there are fewer
            independent units than it seems: the variance grows by (1 + r) / (1 - r), with r their first
            autocorrelation. So few units do not determine r well: Student's t with under 4 degrees of
            freedom, on top of that growth, would leave no useful interval.
        spread: Relative standard deviation between runs of the same thing that the steps of one do not show.
    """
    units = len(series_U)
    if units < UNITS_MIN:
        return Estimate(value, None, units)
    r = _autocorrelation(series_U)
    shrink = (1 - r) / (1 + r)
    variance = float(np.var(draws)) * units / (units - 1) / shrink
    return Estimate(
        value, float(np.sqrt(variance + (spread * value) ** 2)), max(float(UNITS_MIN), units * shrink)
    )


def _autocorrelation(series_U: Floats) -> float:
    """Return the lag-1 autocorrelation plus 1/n for the subtracted mean, clipped to 0 ... 0.8."""
    centred = series_U - series_U.mean()
    total = float((centred**2).sum())
    if not total:
        return 0.0
    found = float((centred[1:] * centred[:-1]).sum()) / total + 1 / len(series_U)
    return min(0.8, max(0.0, found))


def interval(a: Estimate, b: Estimate, level: float) -> tuple[float, float] | None:
    """Return the interval of b - a by Student's t with Welch's degrees of freedom, or None without errors."""
    if a.error is None or b.error is None:
        return None
    va, vb = a.error**2, b.error**2
    if va + vb == 0:
        return b.value - a.value, b.value - a.value
    freedom = (va + vb) ** 2 / (va**2 / (a.units - 1) + vb**2 / (b.units - 1))
    half = t_quantile(0.5 + level / 2, round(freedom, 1)) * float(np.sqrt(va + vb))
    return b.value - a.value - half, b.value - a.value + half


@lru_cache(4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t: with t = sqrt(n) tan x, the density is ∝ cos(x)^(n - 1)."""
    x = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.cos(x).clip(0) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(probability, cumulative / cumulative[-1], x)))
