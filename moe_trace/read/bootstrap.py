"""Resampling with replacement, for many columns at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
_CELLS = 1_000_000  # drawn at once: bounds the memory

Floats = npt.NDArray[np.float64]


def resampled_sums(columns_NK: Floats, rng: np.random.Generator) -> Floats:
    """Sums of N rows drawn with replacement, once for each resample, [RESAMPLES, K].

    The same rows are drawn for all columns. Draws are counted rather than gathered: counts times columns is
    a matrix product, and counting indices is some ten times faster than a multinomial draw.
    """
    rows = len(columns_NK)
    sums = np.empty((RESAMPLES, columns_NK.shape[1]))
    at_once = max(1, _CELLS // rows)
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        drawn = rng.integers(0, rows, (draws, rows))
        drawn += np.arange(draws)[:, None] * rows
        times = np.bincount(drawn.ravel(), minlength=draws * rows).reshape(draws, rows)
        sums[start : start + draws] = times.astype(np.float64) @ columns_NK
    return sums
