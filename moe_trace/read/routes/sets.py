"""Sets of experts as bits of 64-bit words: unions, overlaps and sizes of millions of tokens at once.

Ids are as in `LayerTokens`: E and larger ids mean no expert.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]
"""Sets of experts, [..., W]: expert e is bit e % 64 of word e // 64."""


def expert_sets(ids_NK: np.ndarray, experts: int) -> Words:
    """Return the set of each row's experts, [N, W]."""
    words = max(1, -(-experts // 64))
    bits_EW = np.zeros((np.iinfo(ids_NK.dtype).max + 1, words), np.uint64)
    ids_E = np.arange(experts)
    bits_EW[ids_E, ids_E // 64] = np.uint64(1) << (ids_E % 64).astype(np.uint64)
    sets_NW = np.zeros((len(ids_NK), words), np.uint64)
    for ids_N in ids_NK.T:
        sets_NW |= bits_EW.take(ids_N, axis=0)
    return sets_NW


def members(sets_NW: Words, experts: int) -> Mask:
    """Return whether each expert is in each set, [N, E]."""
    little = np.ascontiguousarray(sets_NW, dtype="<u8").view(np.uint8)
    return np.unpackbits(little, axis=1, count=experts, bitorder="little").view(np.bool_)


def sizes(sets_NW: Words) -> Ints:
    """Return the number of experts in each set, [N]."""
    counts_NW = _bit_counts(sets_NW)
    if counts_NW.shape[1] == 1:
        return counts_NW[:, 0].astype(np.int64)
    sizes_N: Ints = counts_NW.sum(axis=1, dtype=np.int64)
    return sizes_N


def total_size(sets_NW: Words, chosen_N: Mask | None = None) -> int:
    """Return the sum of the sizes of all sets, or of the chosen ones."""
    counts_NW = _bit_counts(sets_NW)
    if chosen_N is not None:
        counts_NW = counts_NW * chosen_N[:, None]
    return int(counts_NW.sum(dtype=np.int64))


def _bit_counts(sets_NW: Words) -> npt.NDArray[np.uint8]:
    """Count the bits that are set, per row and word of some size."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(sets_NW)
    return _BITS_OF_16[np.ascontiguousarray(sets_NW).view(np.uint16)].reshape(len(sets_NW), -1)  # numpy 1


_BITS_OF_16 = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)
