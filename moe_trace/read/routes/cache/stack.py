"""LRU, LFU and static as stack algorithms: a request's place in one order gives the hits for every size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from moe_trace.read.routes.sets import Ints, Words, members, sizes

StackPolicy = Literal["lru", "lfu", "static"]
_CELLS = 1 << 19
_AT_ONCE = 1 << 13


def places(
    policy: StackPolicy, needed: Words, asked: Words | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (steps, experts, places), each [A], of the requests of a layer or of the sets in `asked`.

    An expert is in memory at the start of a step if its place is below the memory's size; its place is 64 * W
    if it was never needed before.

    Args:
        needed: Sets of experts, [S, W].
        asked: Sets of experts to place instead of the requests, [S, W].
    """
    width = 64 * needed.shape[1]
    rows = max(1, _CELLS // width)
    state_E = np.arange(width, dtype=np.int64)
    total_E = _totals(needed, rows) if policy == "static" else None
    largest = width * (len(needed) + 2)
    kind = np.int32 if largest < 1 << 31 else np.int64
    for start in range(0, len(needed), rows):
        used = members(needed[start : start + rows], width)
        keys = np.empty((len(used) + 1, width), kind)
        keys[0] = state_E
        _order(policy, keys, used, start)
        chosen = used if asked is None else members(asked[start : start + rows], width)
        steps, experts = np.nonzero(chosen)
        yield steps + start, experts, _place(keys, steps, experts, total_E)
        state_E = keys[-1]


def _order(policy: StackPolicy, keys: np.ndarray, used: np.ndarray, start: int) -> None:
    """Fill in the sort keys of the experts after each step: the largest is kept first; those below `width`
    were not needed yet. All keys of a step are distinct among needed experts."""
    width = keys.shape[1]
    if policy == "lru":
        step_n = np.arange(start + 1, start + len(keys), dtype=keys.dtype)[:, None] * width
        keys[1:] = np.where(used, step_n + np.arange(width, dtype=keys.dtype), 0)
        np.maximum.accumulate(keys, axis=0, out=keys)
    else:
        keys[1:] = used
        keys[1:] *= width
        np.cumsum(keys, axis=0, out=keys)


def _place(keys: np.ndarray, steps: np.ndarray, experts: np.ndarray, total_E: np.ndarray | None) -> Ints:
    width, found = keys.shape[1], np.empty(len(steps), np.int64)
    for start in range(0, len(steps), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        own = keys[steps[part], experts[part]]
        if total_E is None:
            above = np.packbits(keys.take(steps[part], axis=0) > own[:, None], axis=1)
            place = sizes(above.view(np.uint64))
        else:
            place = total_E[experts[part]]
        found[part] = np.where(own >= width, place, width)
    return found


def _totals(needed: Words, rows: int) -> Ints:
    """Return places by the number of steps of the run that need the expert, [E]; ties: higher id first."""
    width = 64 * needed.shape[1]
    parts = (members(needed[start : start + rows], width) for start in range(0, len(needed), rows))
    totals = sum((part.sum(axis=0) for part in parts), np.zeros(width, np.int64))
    return np.argsort(np.argsort(-(totals * width + np.arange(width))))
