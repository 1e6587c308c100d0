"""Slot-to-expert maps of a load balancer: stored where they change, and checked against the router.

N calls, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.ragged import CountLists

IntArray = npt.NDArray[np.int64]


def changes_only(maps: CountLists, router: IntArray) -> Iterator[list[int] | None]:
    """Yield each map, or an empty list where it equals that of the router's previous call.

    Args:
        router: [N] router of each call.
    """
    last: dict[int, list[int]] = {}
    for key, row in zip(router.tolist(), maps.to_lists(), strict=True):
        yield row if row is None or row != last.get(key) else []
        if row is not None:
            last[key] = row


def all_maps(
    changes: CountLists, counts: CountLists, router: IntArray, sizes: Sequence[tuple[int, int]]
) -> CountLists:
    """Restore all maps from the output of `changes_only`.

    Args:
        counts: `slot_assignments`.
        sizes: (P, E) of each router.

    Raises:
        ValueError: maps or counts do not fit their router.
    """
    if not (changes.known.any() or counts.known.any()):
        return changes
    index = np.arange(len(changes))
    for key in set(router.tolist()):
        rows = np.flatnonzero(changes.known & (router == key))
        index[rows] = rows[np.maximum.accumulate(np.where(changes.sizes[rows] > 0, np.arange(len(rows)), 0))]
    maps = changes.take(index)
    slots, experts = np.array(sizes, np.int64)[router].T
    places = np.repeat(np.arange(len(maps)), maps.sizes)
    fits = (maps.values >= -1) & (maps.values < experts[places])
    same_layout = (maps.known == counts.known).all() and (maps.sizes == counts.sizes).all()
    if not (same_layout and (maps.sizes[maps.known] == slots[maps.known]).all() and fits.all()):
        raise ValueError("expected a count and an expert for each slot of the router, found others")
    return maps
