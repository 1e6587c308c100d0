"""One metric of every forward call as a grid with a row per layer and a column per forward of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable

CELLS_MAX = 20_000  # per figure, so that its size does not grow with the run
COLUMNS_MAX = 400  # more are not distinguishable on a screen
TICKS_MAX = 12


@dataclass(frozen=True, kw_only=True)
class CallGrid:
    """A metric of L layers and C forwards; NaN where a layer has no value."""

    sites: tuple[str, ...]
    """Labels of the layers in model order."""
    steps_C: npt.NDArray[np.int64]
    nth_C: npt.NDArray[np.int64]
    """Index of the forward within its step."""
    values_LC: npt.NDArray[np.float64]

    def means_L(self) -> npt.NDArray[np.float64]:
        """Return the mean over the calls of each layer."""
        return np.asarray(np.nanmean(self.values_LC, axis=1))


def call_grid(calls: CallTable, values_N: npt.NDArray[np.number]) -> CallGrid | None:
    """Return the grid of all forward calls that have a value, or None if there are none.

    A column is the n-th call of each layer in a step: layers are compared where they ran in the same forward.
    """
    rows = np.flatnonzero(calls.forward & ~np.isnan(values_N))
    if not len(rows):
        return None
    calls, values_N = calls.take(rows), values_N[rows]
    sites = sites_of(calls)
    row_of = {site: i for i, site in enumerate(sites)}
    layer = np.array([row_of.get(key.site, -1) for key in calls.keys], np.int64)[calls.router]
    columns, place = np.unique([calls.step, _index_in_step(layer, calls.step)], axis=1, return_inverse=True)
    values_LC = np.full((len(sites), columns.shape[1]), np.nan)
    values_LC[layer, place.ravel()] = values_N
    return CallGrid(sites=tuple(sites), steps_C=columns[0], nth_C=columns[1], values_LC=values_LC)


def sites_of(calls: CallTable) -> list[str]:
    """Return the labels of the layers that were called, in model order."""
    keys = [calls.keys[router] for router in np.unique(calls.router).tolist()]
    return [site for _, site in sorted({(key.layer, key.site) for key in keys})]


def _index_in_step(layer: npt.NDArray[np.int64], step: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the index of each call among the calls of the same layer and step."""
    order = np.lexsort((step, layer))
    begins = np.diff(layer[order], prepend=-1).astype(bool) | (np.diff(step[order], prepend=-1) != 0)
    position = np.arange(len(order))
    nth = np.empty_like(position)
    nth[order] = position - np.maximum.accumulate(np.where(begins, position, 0))
    return nth


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Groups of neighbouring forwards, so that a figure has at most `CELLS_MAX` cells."""

    labels: list[str]
    """One label per group: `12`, `12 to 15`, or `12, forward 3` where a step has several forwards."""
    ticks: dict[str, str]
    """Mapping from labels shown on the axis to their tick text."""
    title: str
    """Title of the axis: what the labels count."""
    values_LB: npt.NDArray[np.float64]
    """Mean over the forwards of each group."""


def grouped_columns(grid: CallGrid) -> Columns:
    """Average neighbouring columns of the grid where there are too many to draw."""
    count = len(grid.steps_C)
    max_columns = max(1, min(COLUMNS_MAX, CELLS_MAX // len(grid.sites)))
    size = -(-count // max_columns)  # equal for all but the last group, to keep the axis even
    groups = np.split(np.arange(count), range(size, count, size))
    starts = [int(group[0]) for group in groups]
    known_LC = ~np.isnan(grid.values_LC)
    sums_LB = np.add.reduceat(np.where(known_LC, grid.values_LC, 0.0), starts, axis=1)
    counts_LB = np.add.reduceat(known_LC, starts, axis=1, dtype=np.int64)
    values_LB = np.divide(sums_LB, counts_LB, out=np.full_like(sums_LB, np.nan), where=counts_LB > 0)
    title, labels = _labels(grid, groups)
    return Columns(labels=labels, ticks=_ticks(grid, groups, labels), title=title, values_LB=values_LB)


def _labels(grid: CallGrid, groups: Sequence[npt.NDArray[np.int64]]) -> tuple[str, list[str]]:
    steps, nth = grid.steps_C.tolist(), grid.nth_C.tolist()
    if not any(nth):
        names = list(map(str, steps))
    elif len(set(steps)) == 1:
        names = list(map(str, nth))
    else:
        names = [f"{step}, forward {n}" for step, n in zip(steps, nth, strict=True)]
    title = "step" if len(set(steps)) > 1 or not any(nth) else f"forward of step {steps[0]}"
    return title, [names[g[0]] if len(g) == 1 else f"{names[g[0]]} to {names[g[-1]]}" for g in groups]


def _ticks(grid: CallGrid, groups: Sequence[npt.NDArray[np.int64]], labels: Sequence[str]) -> dict[str, str]:
    """Choose round step numbers (forwards if there is one step), each at the group that reaches it."""
    several = len(np.unique(grid.steps_C)) > 1
    counted = grid.steps_C if several or not grid.nth_C.any() else grid.nth_C
    first, last = int(counted.min()), int(counted.max())
    every = _round_up(max(1, -(-(last - first) // TICKS_MAX)))
    found: dict[str, str] = {}
    reached = first - 1
    for group, label in zip(groups, labels, strict=True):
        value = int(counted[group[-1]]) // every * every
        if value > reached or (not found and value >= first):
            found[label] = str(value)
            reached = value
    return found


def _round_up(value: int) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50 ... that is not below `value`."""
    power = 10 ** (len(str(value)) - 1)
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value)
