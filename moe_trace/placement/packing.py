"""Replicate experts, and pack weighted items into bins with equal numbers of slots, for all layers at once.

Copies are redundant experts (DeepSeek-V3, arXiv:2412.19437, section 3.4). Packing takes the largest item
first and puts it into the bin where it costs least (Graham 1969, LPT, with equal numbers of items per bin).
The cost is the sum over bins and blocks of (load ÷ mean load)^8: with one block the cheapest bin is simply
the least loaded one; with several, it is the bin that is not yet hot in any of them.
"""

from __future__ import annotations

import numpy as np

from moe_trace.placement.plan import Floats, Ints

_DUPLICATE_COST = (
    1e30  # a second copy in one bin has no use, so it is placed there only if nothing else is left
)


def eighth_power(values: np.ndarray) -> np.ndarray:
    """Return x^8 by three multiplications; np.power takes ten times as long."""
    squares = values * values
    squares *= squares
    squares *= squares
    return squares


def normalised(weights_LIB: Floats, bins: int) -> Floats:
    """Scale weights to units of a bin's mean load, per layer and block; blocks without load get weight 0."""
    mean = weights_LIB.sum(axis=1, keepdims=True) / bins
    return np.divide(weights_LIB, mean, out=np.zeros_like(weights_LIB), where=mean > 0)


def pack(weights_LIB: Floats, bins: int, owners_LI: Ints | None = None) -> Ints:
    """Assign a bin to each item, [L, I], with I / bins items in every bin.

    Args:
        weights_LIB: Normalised load of each item in each block.
        bins: Number of bins K, which divides I.
        owners_LI: Expert that each item is a copy of, 0 ... I - 1; copies avoid each other.
    """
    layers, items, blocks = weights_LIB.shape
    capacity = items // bins
    order_LI = np.argsort(-weights_LIB.sum(axis=2), axis=1, kind="stable")
    loads = np.zeros((layers, bins, blocks))
    filled = np.zeros((layers, bins), np.int64)
    owner_in_bin = None if owners_LI is None else np.zeros((layers, items, bins), bool)
    bin_LI = np.empty((layers, items), np.int64)
    rows = np.arange(layers)
    for item in order_LI.T:
        weight = weights_LIB[rows, item]
        cost = (eighth_power(loads + weight[:, None]) - eighth_power(loads)).sum(axis=2)
        if owner_in_bin is not None and owners_LI is not None:
            cost[owner_in_bin[rows, owners_LI[rows, item]]] += _DUPLICATE_COST
        cost[filled == capacity] = np.inf
        chosen = cost.argmin(axis=1)
        bin_LI[rows, item] = chosen
        loads[rows, chosen] += weight
        filled[rows, chosen] += 1
        if owner_in_bin is not None and owners_LI is not None:
            owner_in_bin[rows, owners_LI[rows, item], chosen] = True
    return bin_LI


def by_bin(bin_LI: Ints) -> Ints:
    """Return the items sorted by bin, [L, I], and by number within a bin."""
    return np.argsort(bin_LI, axis=1, kind="stable")


def replicate(weights_LEB: Floats, extra: int, most: int) -> Ints:
    """Return the number of copies of each expert, [L, E]: 1 each, and `extra` more in total.

    Each extra copy goes to the expert whose copies carry the highest load, in the block where that load is
    highest, which makes the heaviest copy as light as `extra` copies can. No expert gets more than `most`
    copies, since a rank has no use for two, as long as `extra` allows it.
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
    """Return the expert of each copy, [L, I], and the copy's equal share of the load, [L, I, B]."""
    layers, experts = copies_LE.shape
    owners = np.stack([np.repeat(np.arange(experts), row) for row in copies_LE])
    every = np.arange(layers)[:, None]
    return owners, weights_LEB[every, owners] / copies_LE[every, owners][:, :, None]


def part_copies(items_LI: Ints, weights_LIB: Floats, bins: int, owners_LI: Ints) -> Ints:
    """Reorder items so that no bin holds two copies of an expert, wherever that is possible.

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
        owner_of = owners[items]
        in_same_bin = owner_of[bin_of == bin_of[slot]]
        if (in_same_bin == owner_of[slot]).sum() < 2:
            continue
        bin_lacks_owner = ~(owner_of.reshape(bins, capacity) == owner_of[slot]).any(axis=1)
        fits = bin_lacks_owner[bin_of] & ~np.isin(owner_of, in_same_bin)
        if fits.any():
            difference = np.where(fits, np.abs(weight_I[items] - weight_I[items[slot]]), np.inf)
            other = int(difference.argmin())
            items[slot], items[other] = items[other], items[slot]
