"""Rows of counts that are mostly zero, stored without zeros: 16,384 experts, 8 chosen."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

_LARGE = 2**16  # counts


@dataclass(slots=True)
class SparseRows:
    """[L, X] counts, of which only nonzero ones are stored."""

    width: int
    ends_L: np.ndarray
    """End of each row's entries."""
    columns_N: np.ndarray
    counts_N: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.ends_L.nbytes + self.columns_N.nbytes + self.counts_N.nbytes)

    def __len__(self) -> int:
        return len(self.ends_L)

    def __getitem__(self, rows: slice) -> SparseRows:
        """Return the rows from `rows.start` on."""
        first = int(self.ends_L[rows.start - 1]) if rows.start else 0
        return SparseRows(
            self.width,
            self.ends_L[rows.start or 0 :] - first,
            self.columns_N[first:].copy(),
            self.counts_N[first:].copy(),
        )

    def dense(self) -> np.ndarray:
        """Return all counts as [L, X] int64."""
        dense_LX = _zeros(len(self), self.width)
        per_row = np.diff(self.ends_L, prepend=0)
        dense_LX[np.repeat(np.arange(len(self)), per_row), self.columns_N] = self.counts_N
        return dense_LX


def _zeros(rows: int, width: int) -> np.ndarray:
    """Return [rows, width] int64 zeros; large arrays get their own pages, freed with the last row."""
    if rows * width < _LARGE:
        return np.zeros((rows, width), dtype=np.int64)
    return np.ndarray((rows, width), np.int64, mmap.mmap(-1, 8 * rows * width))


def smallest(ints_LX: np.ndarray) -> np.ndarray | SparseRows:
    """Return the counts in the narrowest integers that hold them, or without zeros if that is smaller."""
    lowest, highest = (int(ints_LX.min()), int(ints_LX.max())) if ints_LX.size else (0, 0)
    dtype = np.promote_types(np.min_scalar_type(lowest), np.min_scalar_type(highest))
    filled = int(np.count_nonzero(ints_LX))
    if filled * (dtype.itemsize + 4) + 8 * len(ints_LX) >= ints_LX.size * dtype.itemsize:
        return ints_LX.astype(dtype)
    rows, columns = np.nonzero(ints_LX)
    ends_L = np.cumsum(np.bincount(rows, minlength=len(ints_LX)))
    return SparseRows(
        ints_LX.shape[1], ends_L, columns.astype(np.uint32), ints_LX[rows, columns].astype(dtype)
    )
