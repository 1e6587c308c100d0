"""Belady's optimal policy, computed for all layers and sizes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe_trace.read.routes.sets import Ints, Words, members

_CELLS = 1 << 20


def belady_hits(needed: Sequence[Words], sizes: Sequence[int]) -> Iterator[Ints]:
    """Yield the hits of each step, [C, G], for C memory sizes and G memories.

    Args:
        needed: Sets that the steps of each memory need, [S, W]; S is the same for all.
        sizes: Number of experts that a memory holds, for each of the C sizes.
    """
    steps = len(needed[0])
    width = 64 * max(sets.shape[1] for sets in needed)
    kind = np.int32 if width * (steps + 2) < 1 << 31 else np.int64
    never = np.iinfo(kind).max
    soonest = np.full((len(sizes), len(needed), width), never, kind)
    """Next use of each expert in memory, as step * wide + id; `never` if it is not in memory."""
    for start, used, after in _chunks(needed, width, kind):
        for row in range(len(used)):
            yield (soonest < kind(start + row + 1) * width).sum(axis=2)
            np.copyto(soonest, after[row], where=used[row])
            for size, kept in zip(sizes, soonest, strict=True):
                if size < width:
                    last = np.partition(kept, size - 1, axis=1)[:, size - 1 : size]
                    np.copyto(kept, never, where=kept > last)


def _chunks(
    needed: Sequence[Words], wide: int, kind: type[np.int32] | type[np.int64]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first step, [n, G, E] needed, [n, G, E] next use after each step) in order of time."""
    steps, rows = len(needed[0]), max(1, _CELLS // (wide * len(needed)))
    starts = list(range(0, steps, rows))
    later = np.full((len(needed), wide), np.iinfo(kind).max, kind)
    after_chunk = []
    for start in reversed(starts):
        after_chunk.append(later)
        later = np.minimum(_times(needed, start, rows, wide, kind)[1].min(axis=0), later)
    for start, later in zip(starts, reversed(after_chunk), strict=True):
        used, times = _times(needed, start, rows, wide, kind)
        following = np.concatenate([times[1:], later[None]])[::-1]
        yield start, used, np.minimum.accumulate(following, axis=0)[::-1]


def _times(
    needed: Sequence[Words], start: int, rows: int, wide: int, kind: type[np.int32] | type[np.int64]
) -> tuple[np.ndarray, np.ndarray]:
    """Return which experts are needed, [n, G, E], and step * wide + id where they are."""
    parts = [sets[start : start + rows] for sets in needed]
    used = np.zeros((len(parts[0]), len(parts), wide), np.bool_)
    for memory, sets in enumerate(parts):
        used[:, memory, : 64 * sets.shape[1]] = members(sets, 64 * sets.shape[1])
    when = np.arange(start * wide, (start + len(used)) * wide, dtype=kind).reshape(-1, 1, wide)
    return used, np.where(used, when, kind(np.iinfo(kind).max))
