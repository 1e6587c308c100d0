"""Resampled sums have the distribution of sums of rows drawn with replacement."""

from __future__ import annotations

import numpy as np
import pytest

from moe_trace.read import bootstrap
from moe_trace.read.bootstrap import RESAMPLES, resampled_sums


@pytest.mark.parametrize("rows", [5, 40, 3000])
def test_mean_spread_and_correlation(rows: int) -> None:
    """Sum of N draws: N x mean, standard deviation sqrt(N) x that of a row; columns share their draws."""
    columns = np.random.default_rng(1).normal(3, 2, (rows, 2))
    columns[:, 1] += 0.5 * columns[:, 0]
    sums = resampled_sums(columns, np.random.default_rng(0))
    assert sums.shape == (RESAMPLES, 2)
    spread = columns.std(axis=0) * np.sqrt(rows)
    assert np.allclose(sums.mean(axis=0), columns.sum(axis=0), atol=4 * spread.max() / np.sqrt(RESAMPLES))
    assert np.allclose(sums.std(axis=0) / spread, 1, atol=0.1)
    assert np.corrcoef(sums.T)[0, 1] == pytest.approx(np.corrcoef(columns.T)[0, 1], abs=0.08)


def test_each_resample_draws_as_many_rows() -> None:
    assert (resampled_sums(np.ones((7, 1)), np.random.default_rng(0)) == 7).all()


def test_batches_are_bounded_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches of a single resample the sums still differ from one another."""
    monkeypatch.setattr(bootstrap, "_CELLS", 10)
    sums = resampled_sums(np.arange(100.0)[:, None], np.random.default_rng(0))
    assert len(np.unique(sums)) > 500
