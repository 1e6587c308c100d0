"""Column of variable-length lists of counts: one flat array and the offset of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CountLists:
    """N lists of counts, each of which may be None."""

    values: npt.NDArray[np.integer]
    """Cells of all rows in order, in the smallest type that holds them."""
    starts: IntArray
    """[N + 1] offset of each row in `values`, and the end."""
    known: npt.NDArray[np.bool_]
    """[N] False where the list is None."""

    @staticmethod
    def of(rows: Sequence[Sequence[int] | npt.NDArray[np.integer] | None]) -> CountLists:
        """Convert lists or arrays.

        Raises:
            OverflowError: a count does not fit 64 bits.
        """
        known = np.fromiter((row is not None for row in rows), bool, len(rows))
        sizes = np.fromiter((0 if row is None else len(row) for row in rows), np.int64, len(rows))
        cells = [row for row in rows if row is not None]
        if cells and all(isinstance(row, np.ndarray) for row in cells):
            values = np.concatenate(cells)
        else:
            values = np.fromiter(chain.from_iterable(cells), np.int64, int(sizes.sum()))
        return CountLists(_compact(values), _starts(sizes), known)

    @staticmethod
    def concatenated(parts: Sequence[CountLists]) -> CountLists:
        """Return all rows of all parts."""
        return CountLists(
            _compact(np.concatenate([part.values.astype(np.int64) for part in parts])),
            _starts(np.concatenate([part.sizes for part in parts])),
            np.concatenate([part.known for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.known)

    @property
    def sizes(self) -> IntArray:
        """[N] length of each list; 0 for None."""
        return np.diff(self.starts)

    def row(self, index: int) -> IntArray | None:
        """Return one list as an array."""
        if not self.known[index]:
            return None
        return self.values[self.starts[index] : self.starts[index + 1]].astype(np.int64)

    def rows(self) -> list[IntArray | None]:
        """Return all lists as arrays that share one buffer."""
        values, starts = self.values.astype(np.int64), self.starts.tolist()
        pairs = zip(starts[:-1], starts[1:], self.known.tolist(), strict=True)
        return [values[first:last] if known else None for first, last, known in pairs]

    def to_lists(self) -> Iterator[list[int] | None]:
        """Return an iterator over all lists, as in JSON."""
        return (None if row is None else row.tolist() for row in self.rows())

    def take(self, index: IntArray) -> CountLists:
        """Return the rows at an index."""
        sizes = self.sizes[index]
        starts = _starts(sizes)
        cells = np.arange(starts[-1]) + np.repeat(self.starts[index] - starts[:-1], sizes)
        return CountLists(self.values[cells], starts, self.known[index])

    def totals(self) -> IntArray:
        """Return the sum of each list, [N]; 0 for None."""
        sums = np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def largest(self) -> IntArray:
        """Return the largest count of each list, [N]; 0 for None and for an empty list."""
        found = np.zeros(len(self), np.int64)
        np.maximum.at(found, self._rows(), self.values)
        return found

    def used(self, first: int | None = None) -> IntArray:
        """Return how many counts of each list, or of its first `first`, are not 0, [N]."""
        is_used = self.values != 0
        if first is not None:
            is_used &= self._places() < first
        return np.bincount(self._rows()[is_used], minlength=len(self))

    def summed(self, *, least: int = 0) -> IntArray:
        """Return the sum of all lists, of length `least` or more."""
        return self.summed_by(np.zeros(len(self), np.int64), 1, least=least)[0]

    def summed_by(self, group: IntArray, groups: int, *, least: int = 0) -> IntArray:
        """Return the sum of the lists of each group, `[groups, width]`, with `width` at least `least`.

        Args:
            group: [N] group of each row, from 0.
        """
        sizes = self.sizes
        width = max(least, int(sizes.max(initial=0)))
        found = np.zeros((groups, width), np.int64)
        if len(sizes) and (sizes == width).all():
            np.add.at(found, group, self.values.reshape(len(self), width))
        else:
            np.add.at(found, (np.repeat(group, sizes), self._places()), self.values)
        return found

    def _rows(self) -> IntArray:
        return np.repeat(np.arange(len(self)), self.sizes)

    def _places(self) -> IntArray:
        return np.arange(len(self.values)) - np.repeat(self.starts[:-1], self.sizes)


def _starts(sizes: IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _compact(values: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    for kind in (np.uint16, np.uint32):
        if low >= 0 and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.int64)
