"""Steps resampled with replacement, and what they say about the error of a figure.

Calls of one step share its text and its moment, so that a step is what is drawn, with all of its calls. Long
recordings are cut into stretches of steps that follow each other (batch means; Law, Simulation Modeling and
Analysis, section 9.5.3), which also keeps what drifts together in one unit.
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
"""Fewer steps tell nothing of their spread."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error, which is known from `units` steps; None with too few of them."""

    value: float
    error: float | None
    units: float


def units_of(steps: Sequence[int] | Ints) -> tuple[Ints, int]:
    """Unit of each call by its step, and how many units there are: steps, or stretches of them."""
    distinct, rank = np.unique(np.asarray(steps, dtype=np.int64), return_inverse=True)
    count = len(distinct)
    if count > UNITS_MAX:
        rank = rank * UNITS_MAX // count
    return rank.astype(np.int64), min(count, UNITS_MAX)


def draw(units: int, seed: int = 0) -> Ints:
    """[RESAMPLES, units] which units each resample holds."""
    return np.random.default_rng(seed).integers(0, units, (RESAMPLES, units))


def resampled_sums(columns_UK: Floats, drawn: Ints) -> Floats:
    """[RESAMPLES, K] sums of the drawn rows; the same rows for all columns."""
    units = drawn.shape[1]
    flat = drawn + np.arange(len(drawn))[:, None] * units
    times = np.bincount(flat.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return times.astype(np.float64) @ columns_UK


def estimate(value: float, draws: Floats, series_U: Floats, *, spread: float = 0.0) -> Estimate:
    """The error of a figure from its resamples.

    Args:
        series_U: the figure of each unit in order of time. Where neighbours are alike, there are fewer
            independent units than there seem: the variance grows by (1 + r) / (1 - r), with r their first
            autocorrelation. So few units do not know r well: Student's t of under 4 degrees of freedom, on
            top of that growth, would leave no interval that says anything.
        spread: relative standard deviation between runs of the same thing that steps of one do not show.
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
    """Of neighbours, from 0 to 0.8; corrected for the mean that was taken out (by 1/n)."""
    centred = series_U - series_U.mean()
    total = float((centred**2).sum())
    if not total:
        return 0.0
    found = float((centred[1:] * centred[:-1]).sum()) / total + 1 / len(series_U)
    return min(0.8, max(0.0, found))


def interval(a: Estimate, b: Estimate, level: float) -> tuple[float, float] | None:
    """Of b - a, by Student's t with Welch's degrees of freedom; None where an error is not known."""
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
    """Of Student's t: with t = sqrt(n) tan x, the density is proportional to cos(x)^(n - 1)."""
    x = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.cos(x).clip(0) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(probability, cumulative / cumulative[-1], x)))
