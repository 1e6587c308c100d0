"""Places of calls in a trace as columns: start and duration of each kind of range, on host and device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.sample import RANGE_KINDS, Placement, RangeKind, Span

Side = Literal["host", "device"]
SIDES: tuple[Side, ...] = ("host", "device")
Floats = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Places:
    """Placements of N calls as columns; kinds that no call has are omitted."""

    placed: npt.NDArray[np.bool_]
    """[N] whether the call has a placement at all."""
    spans: Mapping[tuple[Side, RangeKind], Floats] = field(default_factory=dict)
    """[N, 2] start and duration in microseconds; NaN where the call lacks the range."""
    busy_us: Mapping[RangeKind, Floats] = field(default_factory=dict)
    """[N] microseconds; NaN where unknown."""

    @staticmethod
    def of(placements: Iterable[Placement | None], size: int) -> Places:
        """Convert `size` records."""
        placed = np.zeros(size, bool)
        edges: dict[tuple[Side, RangeKind], list[float]] = {}  # lists are far faster to fill than arrays
        busy: dict[RangeKind, Floats] = {}
        for row, placement in enumerate(placements):
            if placement is None:
                continue
            placed[row] = True
            sides: tuple[tuple[Side, dict[RangeKind, Span]], ...]
            sides = (("host", placement.host), ("device", placement.device))
            for side, found in sides:
                for kind, span in found.items():
                    column = edges.get((side, kind))
                    if column is None:
                        column = edges[side, kind] = [math.nan] * (2 * size)
                    column[2 * row], column[2 * row + 1] = span.start_us, span.duration_us
            for kind, us in placement.busy_us.items():
                busy.setdefault(kind, np.full(size, np.nan))[row] = us
        spans = {key: np.array(column).reshape(size, 2) for key, column in edges.items()}
        return Places(placed, spans, busy)

    @staticmethod
    def concatenated(parts: Sequence[Places]) -> Places:
        """Return all rows of all parts."""
        return Places(
            np.concatenate([part.placed for part in parts]),
            {key: np.concatenate([p.span(*key) for p in parts]) for key in _keys(p.spans for p in parts)},
            {kind: np.concatenate([p.busy(kind) for p in parts]) for kind in _keys(p.busy_us for p in parts)},
        )

    def __len__(self) -> int:
        return len(self.placed)

    def span(self, side: Side, kind: RangeKind) -> Floats:
        """Return start and duration, [N, 2]; NaN where there is no range."""
        found = self.spans.get((side, kind))
        return np.full((len(self), 2), np.nan) if found is None else found

    def busy(self, kind: RangeKind) -> Floats:
        """Return the busy time, [N]; NaN where unknown."""
        found = self.busy_us.get(kind)
        return np.full(len(self), np.nan) if found is None else found

    def take(self, index: IntArray) -> Places:
        """Return the rows at an index."""
        return Places(
            self.placed[index],
            {key: column[index] for key, column in self.spans.items()},
            {kind: column[index] for kind, column in self.busy_us.items()},
        )

    def without(self, rows: npt.NDArray[np.bool_]) -> Places:
        """Return a copy in which the given rows have no place."""
        return Places(
            self.placed & ~rows,
            {key: np.where(rows[:, None], np.nan, column) for key, column in self.spans.items()},
            {kind: np.where(rows, np.nan, column) for kind, column in self.busy_us.items()},
        )

    def to_placements(self) -> list[Placement | None]:
        """Convert to records."""
        found = {row: Placement(host={}, device={}) for row in np.flatnonzero(self.placed).tolist()}
        for side in SIDES:
            for kind in (kind for kind in RANGE_KINDS if (side, kind) in self.spans):
                column = self.spans[side, kind]
                rows = np.flatnonzero(~np.isnan(column[:, 0]))
                for row, span in zip(rows.tolist(), column[rows].tolist(), strict=True):
                    getattr(found[row], side)[kind] = Span(*span)
        for busy, us in self.busy_us.items():
            for row in np.flatnonzero(~np.isnan(us)).tolist():
                found[row].busy_us[busy] = float(us[row])
        return [found.get(row) for row in range(len(self))]


def _keys(mappings: Iterator[Mapping]) -> list:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
