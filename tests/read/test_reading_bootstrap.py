"""Tests of bootstrap errors, and that comparisons of equal runs rarely report a change."""

from __future__ import annotations

import numpy as np
import pytest

from moe_trace.read.diff.resampling import (
    Estimate,
    draw,
    estimate,
    interval,
    resampled_sums,
    t_quantile,
    units_of,
)


@pytest.mark.parametrize("rows", [5, 40])
def test_mean_spread_and_correlation(rows: int) -> None:
    """Sum of N draws: N x mean, standard deviation sqrt(N) x that of a row; columns share their draws."""
    columns = np.random.default_rng(1).normal(3, 2, (rows, 2))
    columns[:, 1] += 0.5 * columns[:, 0]
    drawn = draw(rows)
    sums = resampled_sums(columns, drawn)
    assert np.allclose(sums, columns[drawn].sum(axis=1))
    spread = columns.std(axis=0) * np.sqrt(rows)
    assert np.allclose(sums.std(axis=0) / spread, 1, atol=0.1)
    assert np.corrcoef(sums.T)[0, 1] == pytest.approx(np.corrcoef(columns.T)[0, 1], abs=0.12)


def test_long_recordings_are_cut_into_stretches() -> None:
    unit, units = units_of(range(100, 300))
    assert units == 40 and (np.diff(unit) >= 0).all() and (np.bincount(unit) == 5).all()
    assert units_of([7, 3, 3, 9])[0].tolist() == [1, 0, 0, 2]


def test_students_t_by_its_tables() -> None:
    known = {(0.975, 1): 12.706, (0.975, 4): 2.776, (0.995, 10): 3.169, (0.9995, 20): 3.850}
    for (probability, freedom), value in known.items():
        assert t_quantile(probability, freedom) == pytest.approx(value, rel=2e-3)


def _mean_of(values: np.ndarray) -> Estimate:
    return estimate(float(values.mean()), values[draw(len(values))].mean(1), values)


@pytest.mark.parametrize("drift", [0.0, 0.6])
def test_the_interval_holds_what_it_promises(drift: float) -> None:
    """99 % intervals of equal means leave out 0 in some 1 % of trials, also where neighbours are alike."""
    rng, missed = np.random.default_rng(2), 0
    for _ in range(400):
        noise = rng.normal(0, 1, (2, 20))
        for i in range(1, 20):
            noise[:, i] += drift * noise[:, i - 1]
        bounds = interval(*(_mean_of(100 + side) for side in noise), 0.99)
        assert bounds is not None
        missed += not bounds[0] <= 0 <= bounds[1]
    assert missed <= (10 if not drift else 20)


def test_a_spread_between_runs_widens_and_few_units_give_none() -> None:
    values = np.array([10.0, 10.1, 9.9, 10.0, 10.05, 9.95])
    draws = values[draw(6)].mean(1)
    plain, spread = estimate(10.0, draws, values), estimate(10.0, draws, values, spread=0.05)
    assert plain.error is not None and spread.error is not None
    assert spread.error == pytest.approx(np.hypot(plain.error, 0.5))
    few = estimate(10.0, draws, values[:4])
    assert few.error is None and interval(few, plain, 0.99) is None
