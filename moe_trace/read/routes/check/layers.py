"""Layers that are no router's: the same ids in each row, or the rows of another layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ENOUGH_ROWS = 16
"""Fewer tokens than these may well agree."""
_SAMPLE = 4096
_MOSTLY = 0.9


def fixed_layers(ids_TLK: np.ndarray, used_TL: np.ndarray) -> frozenset[int]:
    """Layers with the same ids in each used row, of at least `ENOUGH_ROWS`.

    Of few tokens in a layer of one slot, only those whose id is 0: a router may favour one expert.
    """
    fixed = set()
    for layer in range(ids_TLK.shape[1]):
        rows_TK = ids_TLK[used_TL[:, layer], layer]
        if len(rows_TK) < ENOUGH_ROWS or (rows_TK[0] != rows_TK[-1]).any():
            continue
        if (rows_TK == rows_TK[0]).all() and (rows_TK.shape[1] > 1 or rows_TK[0, 0] == 0):
            fixed.add(layer)
    return frozenset(fixed)


def equal_layers(
    ids_TLK: np.ndarray, used_TL: np.ndarray, fixed: frozenset[int]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(layer, an earlier one, rows that are equal) where nearly all rows of the two are equal in all slots.

    More than nine in ten must be, and twice as many as where the rows of one are shuffled. Layers are
    compared in a sample of 4096 rows first.
    """
    step = max(1, len(ids_TLK) // _SAMPLE)
    sample, used = ids_TLK[::step], used_TL[::step]
    for layer in range(1, ids_TLK.shape[1]):
        for other in range(layer):
            both = used[:, layer] & used[:, other]
            if {layer, other} & fixed or both.sum() < ENOUGH_ROWS:
                continue
            one, two = sample[both, layer], sample[both, other]
            share, chance = _share(one, two), _share(one, np.roll(two, len(two) // 2, axis=0))
            if share > _MOSTLY and share > 2 * chance:
                equal = (
                    (ids_TLK[:, layer] == ids_TLK[:, other]).all(1) & used_TL[:, layer] & used_TL[:, other]
                )
                yield layer, other, np.flatnonzero(equal)
                break


def _share(one: np.ndarray, two: np.ndarray) -> float:
    return float((one == two).all(1).mean())
