"""Detect layers without their own routing: constant rows, another layer's rows, or shifted layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.compare.align import align
from moe_trace.read.routes.saturation import shared_experts

ENOUGH_ROWS = 16
"""Minimum number of rows; fewer tokens may agree by chance."""
_MAX_ROWS = 4096
_MIN_EQUAL_SHARE = 0.9
_MIN_MARGIN = 0.25
"""Fraction of k by which more must be shared with another layer than with the layer's own."""


def fixed_layers(ids_TLK: np.ndarray, used_TL: np.ndarray) -> frozenset[int]:
    """Return layers with the same ids in every used row, with at least `ENOUGH_ROWS` rows.

    A layer with one slot counts only if the id is 0, since a router may favour one expert.
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
    """Yield (layer, earlier layer, equal rows) where nearly all rows of the two are equal in all slots.

    More than nine in ten must be, and more than twice as many as with one layer's rows rotated. A sample of
    4096 to 8191 rows (all, if there are fewer) is compared first.
    """
    step = max(1, len(ids_TLK) // _MAX_ROWS)
    sample, used = ids_TLK[::step], used_TL[::step]
    for layer in range(1, ids_TLK.shape[1]):
        for other in range(layer):
            both_used = used[:, layer] & used[:, other]
            if {layer, other} & fixed or both_used.sum() < ENOUGH_ROWS:
                continue
            ids, other_ids = sample[both_used, layer], sample[both_used, other]
            share, chance = (
                _share(ids, other_ids),
                _share(ids, np.roll(other_ids, len(other_ids) // 2, axis=0)),
            )
            if share > _MIN_EQUAL_SHARE and share > 2 * chance:
                equal = (
                    (ids_TLK[:, layer] == ids_TLK[:, other]).all(1) & used_TL[:, layer] & used_TL[:, other]
                )
                yield layer, other, np.flatnonzero(equal)
                break


def _share(ids: np.ndarray, other_ids: np.ndarray) -> float:
    return float((ids == other_ids).all(1).mean())


def moved_layers(routes: RecordedRoutes, reference: RecordedRoutes) -> Iterator[tuple[int, np.ndarray, str]]:
    """Yield (layer, its rows, message) where a layer shares clearly more with another of the reference.

    Compares the overlap of top-k sets over a sample of 4096 to 8191 tokens (all, if there are fewer).
    """
    aligned = align(routes, reference)
    step = max(1, len(aligned.rows_a) // _MAX_ROWS)
    rows, others = aligned.rows_a[::step], aligned.rows_b[::step]
    for layer, own in aligned.layers:
        experts, slots = routes.num_experts[layer], routes.top_k[layer]
        ids = routes.expert_ids[rows, layer]
        shares = {
            other: float(shared_experts(ids, reference.expert_ids[others, other], experts).mean()) / slots
            for _, other in aligned.layers
            if reference.num_experts[other] == experts
        }
        best = max(shares, key=shares.__getitem__)
        if shares[best] > shares[own] + _MIN_MARGIN:
            message = (
                f"{100 * shares[best]:.0f} % of its experts are those of the reference's "
                f"{reference.layers[best]}, {100 * shares[own]:.0f} % those of its own: "
                f"an offset of {best - own:+d} layers"
            )
            yield layer, aligned.rows_a, message
