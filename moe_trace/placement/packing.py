"""Place items of different weight in bins with the same number of slots, for all layers at once.

Largest first, each into the bin where it costs least (Graham 1969, LPT; with equal numbers of items a bin).
Cost is the sum over bins and blocks of (load ÷ mean load)^8: with one block the cheapest bin is simply the
least loaded one; with several, the bin that is not yet hot in any of them.
"""

from __future__ import annotations

import numpy as np

from moe_trace.placement.plan import Floats, Ints

_HELD = 1e30  # a second copy in one bin helps nobody: only where nothing else is left


def eighth_power(values: np.ndarray) -> np.ndarray:
    """x^8 by three products; np.power takes ten times as long."""
    squares = values * values
    squares *= squares
    squares *= squares
    return squares


def normalised(weights_LIB: Floats, bins: int) -> Floats:
    """Weights in units of a bin's mean load, per layer and block; blocks without load weigh nothing."""
    mean = weights_LIB.sum(axis=1, keepdims=True) / bins
    return np.divide(weights_LIB, mean, out=np.zeros_like(weights_LIB), where=mean > 0)


def pack(weights_LIB: Floats, bins: int, owners_LI: Ints | None = None) -> Ints:
    """The bin of each item, [L, I]; every bin gets I / bins items.

    Args:
        weights_LIB: load of each item in each block, normalised.
        bins: K; divides I.
        owners_LI: the expert that each item is a copy of, 0 ... I - 1; copies avoid each other.
    """
    layers, items, blocks = weights_LIB.shape
    capacity = items // bins
    order_LI = np.argsort(-weights_LIB.sum(axis=2), axis=1, kind="stable")
    loads = np.zeros((layers, bins, blocks))
    filled = np.zeros((layers, bins), np.int64)
    held = None if owners_LI is None else np.zeros((layers, items, bins), bool)
    bin_LI = np.empty((layers, items), np.int64)
    every = np.arange(layers)
    for item in order_LI.T:
        weight = weights_LIB[every, item]
        cost = (eighth_power(loads + weight[:, None]) - eighth_power(loads)).sum(axis=2)
        if held is not None and owners_LI is not None:
            cost[held[every, owners_LI[every, item]]] += _HELD
        cost[filled == capacity] = np.inf
        chosen = cost.argmin(axis=1)
        bin_LI[every, item] = chosen
        loads[every, chosen] += weight
        filled[every, chosen] += 1
        if held is not None and owners_LI is not None:
            held[every, owners_LI[every, item], chosen] = True
    return bin_LI


def by_bin(bin_LI: Ints) -> Ints:
    """Items in the order of their bins, [L, I]; within a bin in the order of their numbers."""
    return np.argsort(bin_LI, axis=1, kind="stable")
