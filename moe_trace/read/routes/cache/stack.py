"""LRU, LFU and static as one order of all experts: the place of a request in it gives hits for every size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.read.routes.sets import Words, members, sizes

StackPolicy = Literal["lru", "lfu", "static"]
_CELLS = 1 << 19
_AT_ONCE = 1 << 13


class Stack:
    """One layer's order of experts through the steps.

    Args:
        needed: [S, W] sets of experts.
        experts: E, columns of the order.
    """

    def __init__(self, policy: StackPolicy, needed: Words, experts: int) -> None:
        self._policy, self._needed, self._experts = policy, needed, experts
        self._wide = 64 * needed.shape[1]
        self._id_E = np.arange(self._wide, dtype=np.int64)

    def places(self, asked: Words | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(steps, experts, places), each [A]: of the requests, or of other sets that are asked about.

        An expert is in memory at the start of a step if its place is below the memory's size; its place is
        `wide` if it was never needed before.
        """
        rows = max(1, _CELLS // self._wide)
        state_E = self._id_E.copy()
        total_E = self._totals(rows) if self._policy == "static" else None
        for start in range(0, len(self._needed), rows):
            used = members(self._needed[start : start + rows], self._wide)
            keys = self._keys(used, start, state_E)
            chosen = used if asked is None else members(asked[start : start + rows], self._wide)
            steps, experts = np.nonzero(chosen)
            yield steps + start, experts, self._place(keys, steps, experts, total_E)
            state_E = keys[-1]

    @property
    def wide(self) -> int:
        """The place of an expert that was never needed before."""
        return self._wide

    def _keys(self, used: np.ndarray, start: int, state_E: np.ndarray) -> np.ndarray:
        """[rows + 1, E] what orders the experts before each step, and after the last: larger is kept first,
        below `wide` is not yet needed. Different for all experts of a step."""
        rows = len(used)
        largest = self._wide * (len(self._needed) + 2)
        keys = np.empty((rows + 1, self._wide), np.int32 if largest < 1 << 31 else np.int64)
        keys[0] = state_E
        if self._policy == "lru":
            step_n = np.arange(start + 1, start + rows + 1, dtype=keys.dtype)[:, None] * self._wide
            keys[1:] = np.where(used, step_n + self._id_E.astype(keys.dtype), 0)
            return np.maximum.accumulate(keys, axis=0, out=keys)
        keys[1:] = used
        keys[1:] *= self._wide
        return np.cumsum(keys, axis=0, out=keys)

    def _place(
        self, keys: np.ndarray, steps: np.ndarray, experts: np.ndarray, total_E: np.ndarray | None
    ) -> np.ndarray:
        places = np.empty(len(steps), np.int64)
        for start in range(0, len(steps), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            own = keys[steps[part], experts[part]]
            if total_E is None:
                above = np.packbits(keys.take(steps[part], axis=0) > own[:, None], axis=1)
                found = sizes(above.view(np.uint64))
            else:
                found = total_E[experts[part]]
            places[part] = np.where(own >= self._wide, found, self._wide)
        return places

    def _totals(self, rows: int) -> npt.NDArray[np.int64]:
        """[E] places by the steps of the whole run that need each expert."""
        totals = np.zeros(self._wide, np.int64)
        for start in range(0, len(self._needed), rows):
            totals += members(self._needed[start : start + rows], self._wide).sum(axis=0)
        order = np.argsort(-(totals * self._wide + self._id_E))
        places = np.empty(self._wide, np.int64)
        places[order] = np.arange(self._wide)
        return places
