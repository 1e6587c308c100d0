"""How many copies each expert gets (redundant experts: DeepSeek-V3, arXiv:2412.19437, section 3.4)."""

from __future__ import annotations

import numpy as np

from moe_trace.placement.plan import Floats, Ints


def replicate(weights_LEB: Floats, extra: int, most: int) -> Ints:
    """Copies of each expert, [L, E]: 1 each, and `extra` more in all.

    One after another goes to the expert whose copies carry most, in the block where they carry most; that
    makes the heaviest copy as light as `extra` copies can. No expert gets more than `most` copies, since a
    rank has no use for two, as long as `extra` allows it.
    """
    heaviest_LE = weights_LEB.max(axis=2)
    copies = np.ones(heaviest_LE.shape, np.int64)
    every = np.arange(len(copies))
    for _ in range(extra):
        carried = heaviest_LE / copies
        full = copies >= most
        carried[full & ~full.all(axis=1, keepdims=True)] = -1
        copies[every, carried.argmax(axis=1)] += 1
    return copies


def as_items(weights_LEB: Floats, copies_LE: Ints) -> tuple[Ints, Floats]:
    """Each copy as an item: the expert it is of, [L, I], and its even share of the load, [L, I, B]."""
    layers, experts = copies_LE.shape
    owners = np.stack([np.repeat(np.arange(experts), row) for row in copies_LE])
    every = np.arange(layers)[:, None]
    return owners, weights_LEB[every, owners] / copies_LE[every, owners][:, :, None]


def part_copies(items_LI: Ints, weights_LIB: Floats, bins: int, owners_LI: Ints) -> Ints:
    """Orders by bin in which no bin holds two copies of an expert, wherever that can be had.

    The last items of a packing find only the last bins open. A second copy is swapped with the item of the
    most similar weight in a bin that can take it.
    """
    parted = items_LI.copy()
    for layer, items in enumerate(parted):
        owners = owners_LI[layer]
        held = owners[items].reshape(bins, -1)
        if (np.diff(np.sort(held, axis=1), axis=1) == 0).any():
            _part(items, weights_LIB[layer].sum(axis=1), bins, owners)
    return parted


def _part(items: Ints, weight_I: Floats, bins: int, owners: Ints) -> None:
    capacity = len(items) // bins
    bin_of = np.arange(len(items)) // capacity
    for slot in range(len(items)):
        held = owners[items]
        here = held[bin_of == bin_of[slot]]
        if (here == held[slot]).sum() < 2:
            continue
        without = ~(held.reshape(bins, capacity) == held[slot]).any(axis=1)
        fits = without[bin_of] & ~np.isin(held, here)
        if fits.any():
            apart = np.where(fits, np.abs(weight_I[items] - weight_I[items[slot]]), np.inf)
            other = int(apart.argmin())
            items[slot], items[other] = items[other], items[slot]
