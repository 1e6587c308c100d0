"""Test whether a call's time follows its load: least squares with controls, checked on held-out calls.

Controls are first removed from time and load (Frisch, Waugh and Lovell), by the strongest of three
comparisons that leaves enough of the load's variation:

    forwards and layers   each call against the other layers of its forward and the other forwards of its
                          layer
    forwards              each call against the other layers of its forward: step, tokens and drift cancel,
                          and the layers are assumed to be alike
    trend                 calls of different forwards, with the number of tokens and a parabola over the
                          forwards removed

The check uses five folds of forwards (of layers, if there are few forwards): slopes fitted without a fold
predict it. `held_out_r2` is the share of the variation in time that these predictions explain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Comparison = Literal["forwards and layers", "forwards", "trend", "ranks"]
"""`ranks` compares the ranks of one call (`read.ranks.imbalance`)."""

CALLS_MIN = 8
LEVER_MIN = 0.03
"""Minimum standard deviation of a load metric after removing controls, relative to its mean."""
FOLDS = 5
BOTH_MIN = 0.02
"""Minimum increase of the explained share for using two metrics instead of one."""
ALIKE = 0.98
"""Correlation above which two metrics cannot be separated."""


# Two-sided 97.5 % points of Student's t by degrees of freedom; beyond the table the next lower entry holds.
_T_975 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980, 1000: 1.962,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Calls:
    """N calls of layers that are alike. Arrays are [N]."""

    time_us: Array
    slots: Array
    forward: npt.NDArray[np.int64]
    """Forward of each call."""
    layer: npt.NDArray[np.int64]
    figures: dict[str, Array]
    """Load metrics that the time may depend on."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Linear fit of the time to load metrics, with a slope in microseconds per unit of each."""

    comparison: Comparison
    figures: tuple[str, ...]
    slopes: Array
    covariance: Array
    freedom: int
    held_out_r2: float


def fit_load(calls: Calls, *, with_trend: bool = True) -> Fit | None:
    """Fit the load metrics that predict unseen calls best; None if no comparison has enough variation.

    Args:
        with_trend: Whether calls without others to compare with may be compared with a trend.
    """
    for comparison, take_out, controls in _comparisons(calls, with_trend):
        residuals = {name: take_out(values) for name, values in calls.figures.items()}
        varies = {
            name: values
            for name, values in residuals.items()
            if values.std() >= LEVER_MIN * abs(calls.figures[name].mean()) > 0
        }
        if varies and len(calls.time_us) - controls - len(varies) >= CALLS_MIN // 2:
            return _best(comparison, take_out(calls.time_us), varies, _folds(calls), controls)
    return None


def _comparisons(
    calls: Calls, with_trend: bool
) -> Iterator[tuple[Comparison, Callable[[Array], Array], int]]:
    """Yield each comparison with a function that removes its controls, and their number."""
    forwards, layers = (len(set(of.tolist())) for of in (calls.forward, calls.layer))
    if layers > 1:
        if forwards >= CALLS_MIN // 2:
            effects = (calls.forward, calls.layer)
            yield "forwards and layers", lambda values: _demeaned(values, *effects), forwards + layers - 1
        yield "forwards", lambda values: _demeaned(values, calls.forward), forwards
    if with_trend and forwards >= CALLS_MIN:
        trend = _trend(calls, layers)
        yield "trend", lambda values: _residual(values, trend), int(np.linalg.matrix_rank(trend))


def _demeaned(values: Array, *groups: npt.NDArray[np.int64]) -> Array:
    """Subtract the means of all groups in turn; one round is enough if every layer ran in every forward."""
    for _ in range(20 if len(groups) > 1 else 1):
        for group in groups:
            total = np.bincount(group, weights=values)
            count = np.maximum(1, np.bincount(group))
            values = values - (total / count)[group]
    return values


def _trend(calls: Calls, layers: int) -> Array:
    place = calls.forward / max(1, calls.forward.max())
    columns = [np.ones_like(calls.time_us), calls.slots / max(1.0, calls.slots.max()), place, place**2]
    columns += [(calls.layer == layer).astype(np.float64) for layer in range(1, layers)]
    return np.stack(columns, axis=1)


def _residual(values: Array, controls: Array) -> Array:
    solution, *_ = np.linalg.lstsq(controls, values, rcond=None)
    return values - controls @ solution


def _folds(calls: Calls) -> npt.NDArray[np.int64]:
    forwards = len(set(calls.forward.tolist()))
    return (calls.forward if forwards >= FOLDS else calls.layer) % FOLDS


def _best(
    comparison: Comparison,
    time_us: Array,
    figures: dict[str, Array],
    folds: npt.NDArray[np.int64],
    controls: int,
) -> Fit:
    choices: list[Sequence[str]] = [(name,) for name in figures]
    explained = {tuple(c): _held_out_r2(time_us, _columns(figures, c), folds) for c in choices}
    best = max(explained, key=explained.__getitem__)
    names = tuple(figures)
    if len(names) == 2 and abs(np.corrcoef(figures[names[0]], figures[names[1]])[0, 1]) < ALIKE:
        both = _held_out_r2(time_us, _columns(figures, names), folds)
        if both > explained[best] + BOTH_MIN:
            explained[names] = both
            best = names
    columns = _columns(figures, best)
    slopes = _slopes(time_us, columns)
    freedom = len(time_us) - controls - len(best)
    residual = time_us - columns @ slopes
    covariance = np.linalg.inv(columns.T @ columns) * float(residual @ residual) / freedom
    return Fit(comparison, best, slopes, covariance, freedom, explained[best])


def _columns(figures: dict[str, Array], names: Sequence[str]) -> Array:
    return np.stack([figures[name] for name in names], axis=1)


def _slopes(time_us: Array, columns: Array) -> Array:
    solution, *_ = np.linalg.lstsq(columns, time_us, rcond=None)
    return np.asarray(solution, dtype=np.float64)


def _held_out_r2(time_us: Array, columns: Array, folds: npt.NDArray[np.int64]) -> float:
    error = 0.0
    for fold in sorted(set(folds.tolist())):
        unseen = folds == fold
        slopes = _slopes(time_us[~unseen], columns[~unseen])
        error += float(((time_us[unseen] - columns[unseen] @ slopes) ** 2).sum())
    total = float((time_us**2).sum())
    return 1 - error / total if total else 0.0


def half_interval(fit: Fit, difference: Array) -> float:
    """Return half the 95 % interval of the fitted effect of a difference in the metrics."""
    t = _T_975[max(n for n in _T_975 if n <= fit.freedom)]
    return float(t * np.sqrt(difference @ fit.covariance @ difference))
