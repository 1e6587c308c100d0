"""Table of router calls: every field of `RoutingSample` as a column, with the rows as a view.

Reading and analysis work on whole columns. N calls, R routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.placements import Places, Side
from moe_trace.data.calls.ragged import CountLists
from moe_trace.data.calls.sample import RangeKind, RoutingSample

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NONE = np.iinfo(np.int64).min
"""Value of None in an integer column."""
_CHUNK = 4096


class RouterKey(NamedTuple):
    """Identity of a call's router."""

    site: str
    name: str
    layer: int


_TYPES = {f.name: str(f.type) for f in fields(RoutingSample)}
_KINDS = {"int": int, "int | None": int, "float | None": float, "bool": bool, "Phase": str, "Stage": str}
NUMBERS = tuple(name for name, kind in _TYPES.items() if kind in _KINDS and name not in RouterKey._fields)
"""Fields with one value per call."""
OPTIONAL = frozenset(name for name, kind in _TYPES.items() if kind.endswith("| None"))
LISTS = tuple(name for name, kind in _TYPES.items() if "NDArray" in kind)
"""Fields with a list of counts per call."""
DEFAULTS = {f.name: f.default for f in fields(RoutingSample) if f.default is not MISSING}
"""Fields added in later releases, which older files lack."""


def kind_of(name: str) -> type:
    """Return the type of a column's cells: `int`, `float`, `bool` or `str`."""
    return _KINDS[_TYPES[name]]


def column_of(name: str, values: Sequence[Any]) -> npt.NDArray:
    """Convert plain values to a column; None becomes NaN or `NONE`.

    Raises:
        OverflowError: a number does not fit 64 bits.
    """
    kind = kind_of(name)
    if kind is str:
        return np.array(values, dtype="U") if len(values) else np.array([], dtype="U1")
    if name in OPTIONAL:
        missing = np.nan if kind is float else NONE
        values = [missing if value is None else value for value in values]
    return np.array(values, dtype={int: np.int64, float: np.float64, bool: np.bool_}[kind])


@dataclass(frozen=True, eq=False)
class CallTable(Sequence[RoutingSample]):
    """N router calls: a sequence of `RoutingSample`s, each made on access."""

    keys: tuple[RouterKey, ...]
    router: IntArray
    """[N] index into `keys`."""
    numbers: Mapping[str, npt.NDArray]
    """[N] column of each field in `NUMBERS`."""
    lists: Mapping[str, CountLists]
    places: Places

    @staticmethod
    def of(samples: Sequence[RoutingSample]) -> CallTable:
        """Convert rows to a table; a table is returned unchanged."""
        if isinstance(samples, CallTable):
            return samples
        keys: dict[RouterKey, int] = {}
        index = [keys.setdefault(RouterKey(s.site, s.name, s.layer), len(keys)) for s in samples]
        return CallTable(
            tuple(keys),
            np.array(index, np.int64),
            {name: column_of(name, [getattr(s, name) for s in samples]) for name in NUMBERS},
            {name: CountLists.of([getattr(s, name) for s in samples]) for name in LISTS},
            Places.of((s.placement for s in samples), len(samples)),
        )

    @staticmethod
    def concatenated(tables: Sequence[CallTable]) -> CallTable:
        """Return all calls of all tables, in order."""
        if len(tables) == 1:
            return tables[0]
        if not tables:
            return CallTable.of(())
        keys: dict[RouterKey, int] = {}
        router = []
        for table in tables:
            index = np.array([keys.setdefault(key, len(keys)) for key in table.keys], np.int64)
            router.append(index[table.router])
        return CallTable(
            tuple(keys),
            np.concatenate(router),
            {name: np.concatenate([t.numbers[name] for t in tables]) for name in NUMBERS},
            {name: CountLists.concatenated([t.lists[name] for t in tables]) for name in LISTS},
            Places.concatenated([t.places for t in tables]),
        )

    # -- columns --------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> npt.NDArray:
        """Return a column by its field name, such as `calls.tokens` or `calls.site`."""
        if name in RouterKey._fields:
            kind = np.int64 if name == "layer" else object
            return np.array([getattr(key, name) for key in self.keys], dtype=kind)[self.router]
        if name in NUMBERS:
            return self.numbers[name]
        raise AttributeError(f"CallTable has no column {name!r}")

    @property
    def forward(self) -> Mask:
        """[N] whether the call counts in the load, that is, is not a recomputation."""
        return self.numbers["phase"] == "forward"

    @property
    def assignments(self) -> CountLists:
        """[N][E] `RoutingSample.assignments`."""
        return self.lists["assignments"]

    def duration_us(self, side: Side, kind: RangeKind) -> npt.NDArray[np.float64]:
        """Return the duration of a kind of range, [N]; NaN where the call has none."""
        return self.places.span(side, kind)[:, 1]

    def host_us(self) -> npt.NDArray[np.float64]:
        """Return the host time of each call, [N]: its router's range, or else the time between its hooks."""
        ranged = self.duration_us("host", "router")
        return np.where(np.isnan(ranged), _between_hooks_us(self), ranged)

    def call_keys(self) -> list[tuple[str, int]]:
        """Return the (module path of the router, call number) of each call, [N]."""
        names = [key.name for key in self.keys]
        return [(names[r], call) for r, call in zip(self.router.tolist(), self.call.tolist(), strict=True)]

    def total(self, name: str) -> int:
        """Return the exact sum of an integer column, however large."""
        return sum(self.numbers[name].tolist())

    def of_router(self, name: str) -> Mask:
        """Return whether each call is of the router with that module path, [N]."""
        return np.isin(self.router, [i for i, key in enumerate(self.keys) if key.name == name])

    # -- rows -----------------------------------------------------------------------------------------

    def take(self, rows: IntArray | Mask | slice) -> CallTable:
        """Return the table of the given rows."""
        index = np.arange(len(self))[rows]
        return CallTable(
            self.keys,
            self.router[index],
            {name: column[index] for name, column in self.numbers.items()},
            {name: column.take(index) for name, column in self.lists.items()},
            self.places.take(index),
        )

    def with_numbers(self, **columns: npt.NDArray) -> CallTable:
        """Return the same calls with some columns replaced."""
        return replace(self, numbers={**self.numbers, **columns})

    def __len__(self) -> int:
        return len(self.router)

    @overload
    def __getitem__(self, index: int) -> RoutingSample: ...
    @overload
    def __getitem__(self, index: slice) -> CallTable: ...
    def __getitem__(self, index: int | slice) -> RoutingSample | CallTable:
        if isinstance(index, slice):
            return self.take(index)
        row = range(len(self))[index]
        return next(self.take(slice(row, row + 1))._rows())

    def __iter__(self) -> Iterator[RoutingSample]:
        for start in range(0, len(self), _CHUNK):
            part = self if len(self) <= _CHUNK else self.take(slice(start, start + _CHUNK))
            yield from part._rows()

    def _rows(self) -> Iterator[RoutingSample]:
        columns = {name: self.values(name) for name in NUMBERS}
        columns |= {name: self.lists[name].rows() for name in LISTS}
        columns["placement"] = self.places.to_placements()
        names = tuple(columns)
        routers = [self.keys[i] for i in self.router.tolist()]
        for key, row in zip(routers, zip(*columns.values(), strict=True), strict=True):
            yield RoutingSample(**key._asdict(), **dict(zip(names, row, strict=True)))

    def values(self, name: str) -> list[Any]:
        """Return a column as plain values, with None where unknown."""
        column = self.numbers[name]
        if name not in OPTIONAL:
            return column.tolist()
        if kind_of(name) is float:
            return known_values(column)
        return [None if value == NONE else value for value in column.tolist()]


def rows_in(calls: CallTable, other: CallTable) -> IntArray:
    """Return the row of each call in another table, [N]; -1 where it has none."""
    row_of = {key: i for i, key in enumerate(other.call_keys())}
    return np.array([row_of.get(key, -1) for key in calls.call_keys()], np.int64)


def known_values(values: npt.NDArray[np.float64]) -> list[float | None]:
    """Return plain values, with None for NaN."""
    return [None if value != value else value for value in values.tolist()]


def mean_over_tokens(calls: CallTable, figure: str) -> float | None:
    """Return the mean of a column weighted by each call's finite tokens; None if no call has a value."""
    values = calls.numbers[figure]
    known = ~np.isnan(values)
    weights = (calls.tokens - calls.nonfinite_tokens)[known]
    total = int(weights.sum())
    return float(values[known] @ weights) / total if total else None


def mean_over_calls(calls: CallTable, figure: str) -> float | None:
    """Return the mean over the calls that have a value; None if none has."""
    known = calls.numbers[figure][~np.isnan(calls.numbers[figure])]
    return float(known.mean()) if len(known) else None


def load_by_step(calls: CallTable, names: Sequence[str], *, least: int = 0) -> tuple[IntArray, IntArray]:
    """Return the steps of the forward calls, [S], and the routers' assignments in each, `[S, L, E]`.

    Args:
        names: module paths of the L routers.
        least: lower bound of E, the length of the longest list of counts.
    """
    forward = np.flatnonzero(calls.forward)
    steps, step = np.unique(calls.step[forward], return_inverse=True)
    row = {name: i for i, name in enumerate(names)}
    layer = np.array([row.get(key.name, -1) for key in calls.keys], np.int64)[calls.router[forward]]
    is_named = layer >= 0
    group = step[is_named] * len(names) + layer[is_named]
    loads = calls.assignments.take(forward[is_named]).summed_by(group, len(steps) * len(names), least=least)
    return steps, loads.reshape(len(steps), len(names), loads.shape[1])


def routers_timed(calls: CallTable) -> Mask:
    """Return whether the router has a time of its own in the trace, [N]."""
    return ~(np.isnan(calls.duration_us("host", "router")) & np.isnan(calls.duration_us("device", "router")))


def routers_ranged(calls: CallTable) -> Mask:
    """Return whether the router has a range of its own on the host, [N]; calls inside graphs have none."""
    return ~np.isnan(calls.duration_us("host", "router")) & ~calls.in_graph


def placed_by_clock(calls: CallTable) -> Mask:
    """Return whether only the host's clock places the call, [N].

    Its router then takes exactly the time between its hooks. A range takes longer: it is opened before the
    first hook and closed after the last.
    """
    return routers_ranged(calls) & (calls.duration_us("host", "router") == _between_hooks_us(calls))


def _between_hooks_us(calls: CallTable) -> npt.NDArray[np.float64]:
    return (calls.numbers["host_end_ns"] - calls.numbers["host_start_ns"]) / 1000
