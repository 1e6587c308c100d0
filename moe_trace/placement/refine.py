"""Local search: swap two items of different bins while that lowers the cost (defined in `packing`)."""

from __future__ import annotations

import numpy as np

from moe_trace.placement.packing import eighth_power
from moe_trace.placement.plan import Floats, Ints

_MIN_DECREASE = 1e-6  # minimum decrease of a swap, relative to the total cost
_EVEN_RATIO = 1.0005  # a layer is done once its hottest bin is this close to the mean
_MAX_TRIES = 8  # number of hottest bins that are tried before a layer is done
_MAX_CELLS = 500_000  # number of swaps that are evaluated at once


def refine(items_LI: Ints, weights_LIB: Floats, bins: int, owners_LI: Ints | None = None) -> Ints:
    """Improve orders of the items by bin, [L, I]; the cost of no layer increases.

    Each round takes the hottest bin of each layer (in the block where it is hottest) and makes the best of
    all swaps between it and the other bins; if none pays, the next hottest bin is tried. A layer is done when
    none of its hottest bins has a swap that pays, or when it is even.

    Args:
        items_LI: Items in the order of their bins, I / bins in each.
        weights_LIB: Normalised load of each item.
        owners_LI: Expert that each item is a copy of; no swap brings two copies into one bin.
    """
    layers, items, _ = weights_LIB.shape
    found = items_LI.copy()
    if bins in (1, items):  # swaps would only rename bins
        return found
    batch = max(1, _MAX_CELLS // (items * (items // bins)))
    for start in range(0, layers, batch):
        part = slice(start, start + batch)
        search = _Search(found[part], weights_LIB[part], bins, None if owners_LI is None else owners_LI[part])
        search.run()
        found[part] = search.items
    return found


class _Search:
    """Search state of several layers; `values` and `loads` are updated with each swap."""

    def __init__(self, items: Ints, weights: Floats, bins: int, owners: Ints | None) -> None:
        self.items = items.copy()
        self.bins, self.capacity = bins, items.shape[1] // bins
        self.values = np.take_along_axis(weights, items[:, :, None], axis=1)
        self.loads = self.values.reshape(len(items), bins, self.capacity, -1).sum(axis=2)
        self.owners = None if owners is None else np.take_along_axis(owners, items, axis=1)
        self.bin_I = np.arange(items.shape[1]) // self.capacity
        if self.owners is not None:  # number of copies of each expert in each bin
            self.held = np.zeros((len(items), int(self.owners.max()) + 1, bins), np.int16)
            np.add.at(self.held, (np.arange(len(items))[:, None], self.owners, self.bin_I[None]), 1)

    def run(self) -> None:
        """Swap until nothing pays, with at most about 4 swaps per item so that the search ends."""
        tries = np.zeros(len(self.items), np.int64)  # rank of the hottest bin to try next, per layer
        for _ in range(4 * self.items.shape[1] + self.bins):
            active = np.flatnonzero(
                (tries < min(self.bins, _MAX_TRIES)) & (self.loads.max(axis=(1, 2)) > _EVEN_RATIO)
            )
            if not len(active):
                return
            hottest = np.argsort(-self.loads[active].max(axis=2), axis=1, kind="stable")
            hot = hottest[np.arange(len(active)), tries[active]]
            improved = self._swap(active, hot)
            tries[active] = np.where(improved, 0, tries[active] + 1)

    def _swap(self, layers: Ints, hot: Ints) -> np.ndarray:
        """Make the best swap with the hot bin of each layer, and return where one paid."""
        rows = np.arange(len(layers))
        inside = hot[:, None] * self.capacity + np.arange(self.capacity)
        cost = self._costs(layers, hot, inside)
        cost[np.broadcast_to((self.bin_I == hot[:, None])[:, None], cost.shape)] = np.inf
        if self.owners is not None:
            cost[self._makes_duplicate(layers, hot, inside)] = np.inf
        best = cost.reshape(len(layers), -1).argmin(axis=1)
        given, received = inside[rows, best // self.bin_I.size], best % self.bin_I.size
        total = eighth_power(self.loads[layers]).sum(axis=(1, 2))
        improved = self._change_of_cost(layers, given, received) < -_MIN_DECREASE * total
        improved &= np.isfinite(cost.reshape(len(layers), -1)[rows, best])
        self._exchange(layers[improved], given[improved], received[improved])
        return improved

    def _costs(self, layers: Ints, hot: Ints, inside: Ints) -> np.ndarray:
        """Return the change of cost by each swap with the hot bin, [l, capacity, I], in single precision."""
        rows = np.arange(len(layers))
        cost = np.zeros((*inside.shape, self.bin_I.size), np.float32)
        for block in range(self.values.shape[2]):
            values = self.values[layers, :, block].astype(np.float32)
            loads = self.loads[layers, :, block].astype(np.float32)
            change = values[:, None] - values[rows[:, None], inside][:, :, None]
            hot_load, other = loads[rows, hot], loads[:, self.bin_I]
            cost += eighth_power(hot_load[:, None, None] + change)
            cost += eighth_power(other[:, None] - change)
            cost -= (eighth_power(hot_load)[:, None] + eighth_power(other))[:, None]
        return cost

    def _change_of_cost(self, layers: Ints, given: Ints, received: Ints) -> Floats:
        """Return the change of cost by one swap per layer, in double precision."""
        a, b = self.loads[layers, self.bin_I[given]], self.loads[layers, self.bin_I[received]]
        change = self.values[layers, received] - self.values[layers, given]
        before, after = eighth_power(a) + eighth_power(b), eighth_power(a + change) + eighth_power(b - change)
        difference: Floats = (after - before).sum(axis=1)
        return difference

    def _makes_duplicate(self, layers: Ints, hot: Ints, inside: Ints) -> np.ndarray:
        """Return which swaps would leave two copies of one expert in a bin, [l, capacity, I]."""
        assert self.owners is not None
        at, owners = layers[:, None], self.owners[layers]
        given_owners = owners[np.arange(len(layers))[:, None], inside]
        in_hot_bin = self.held[at, owners, hot[:, None]] > 0  # the hot bin already has what it would get
        in_other_bin = (
            self.held[at, given_owners][:, :, self.bin_I] > 0
        )  # the other bin already has what it would get
        return in_hot_bin[:, None] | in_other_bin

    def _exchange(self, layers: Ints, given: Ints, received: Ints) -> None:
        a, b = self.bin_I[given], self.bin_I[received]
        change = self.values[layers, received] - self.values[layers, given]
        self.loads[layers, a] += change
        self.loads[layers, b] -= change
        if self.owners is not None:
            for slots, source, target in ((given, a, b), (received, b, a)):
                owner = self.owners[layers, slots]
                self.held[layers, owner, source] -= 1
                self.held[layers, owner, target] += 1
        for array in (self.items, self.values, self.owners):
            if array is not None:
                kept = array[layers, given].copy()
                array[layers, given] = array[layers, received]
                array[layers, received] = kept
