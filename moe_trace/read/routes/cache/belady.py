"""Belady's optimum, all layers and sizes in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe_trace.read.routes.sets import Ints, Words, members

_CELLS = 1 << 20


def belady_hits(needed: Sequence[Words], sizes: Sequence[int]) -> Iterator[Ints]:
    """[C, G] hits of each step, for C memory sizes and G memories that each hold so many experts.

    Args:
        needed: [S, W] of each memory: the sets that its steps need; S is the same for all.
    """
    steps = len(needed[0])
    wide = 64 * max(sets.shape[1] for sets in needed)
    kind = np.int32 if wide * (steps + 2) < 1 << 31 else np.int64
    never = np.iinfo(kind).max
    soonest = np.full((len(sizes), len(needed), wide), never, kind)
    """When an expert in memory is needed next, as step * wide + id; `never` where it is not in memory."""
    for start, used, after in _chunks(needed, wide, kind):
        for row in range(len(used)):
            yield (soonest < kind(start + row + 1) * wide).sum(axis=2)
            np.copyto(soonest, after[row], where=used[row])
            for size, kept in zip(sizes, soonest, strict=True):
                if size < wide:
                    last = np.partition(kept, size - 1, axis=1)[:, size - 1 : size]
                    np.copyto(kept, never, where=kept > last)


def _chunks(
    needed: Sequence[Words], wide: int, kind: type[np.int32] | type[np.int64]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first step, [n, G, E] needed, [n, G, E] next need after each step), forwards in time."""
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
    """[n, G, E] what is needed, and step * wide + id where it is."""
    parts = [sets[start : start + rows] for sets in needed]
    used = np.zeros((len(parts[0]), len(parts), wide), np.bool_)
    for memory, sets in enumerate(parts):
        used[:, memory, : 64 * sets.shape[1]] = members(sets, 64 * sets.shape[1])
    when = np.arange(start * wide, (start + len(used)) * wide, dtype=kind).reshape(-1, 1, wide)
    return used, np.where(used, when, kind(np.iinfo(kind).max))
