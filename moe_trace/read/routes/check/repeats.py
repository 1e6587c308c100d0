"""Detect rows that repeat the previous row, or the same ids in all layers, more often than a router would.

A token that follows itself may have nearly the routes of its predecessor, and occasionally exactly those. A
router that does so also produces near misses, a stale buffer does not; so exact repetitions are compared with
near ones, and with how often any two rows of the file agree.
"""

from __future__ import annotations

from math import perm, prod
from typing import Any

import numpy as np

from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes
from moe_trace.read.routes.check.layers import ENOUGH_ROWS
from moe_trace.read.routes.tokens import TokenOrder

_NEAR_MISS = 4, 32
"""A near miss differs in at most this many slots, or at most one in this many."""
_MIN_SLOTS = 8
"""Minimum number of slots in all layers: shorter rows may well repeat where a token follows itself."""
_SIGMAS = 5
_MAX_CHANCE = 0.2
"""Probability of agreement above which rows that equal their neighbours mean nothing."""
_MAX_UNIFORM_CHANCE = 1e-6
"""Probability of agreement under uniform choice above which repeats mean nothing: one layer of top 1."""
_NATURAL = 8
"""Minimum number of rows without repetition to estimate the probability of a repetition."""
_START = 4
"""Repetitions of one token allowed at the start of a sequence, where states are equal at every position."""


def repeated_rows(routes: RecordedRoutes, used_TL: np.ndarray, fixed: frozenset[int]) -> np.ndarray:
    """Return rows that equal those of the previous token in all slots, if there are too many of them.

    The previous token has the previous position in the same sequence, or is the previous row if sequences are
    unknown. With token ids, tokens that follow themselves are left out.
    """
    layers = [layer for layer in range(len(routes.layers)) if layer not in fixed]
    if len(routes) < ENOUGH_ROWS or sum(routes.top_k[layer] for layer in layers) < _MIN_SLOTS:
        return np.zeros(0, np.int64)
    ids = routes.expert_ids if len(layers) == len(routes.layers) else routes.expert_ids[:, layers]
    rows = np.ascontiguousarray(ids).reshape(len(ids), -1)
    before, after = _pairs(routes, np.any(used_TL[:, layers], axis=1))
    differing = _differing(rows, before, after)
    exact = differing == 0
    near = int(((differing > 0) & (differing <= max(_NEAR_MISS[0], rows.shape[1] // _NEAR_MISS[1]))).sum())
    repeated = after[exact]
    if routes.token_ids is not None:
        other = routes.token_ids[before[exact]] != routes.token_ids[after[exact]]
        repeated = repeated[other]
    else:
        position = routes.position[repeated]
        repeated = repeated[(position == UNKNOWN) | (position >= _START)]
    natural = np.delete(rows, after[exact], axis=0)
    chance = max(
        _agreement(natural if len(natural) >= _NATURAL else rows), _uniform_probability(routes, layers)
    )
    too_many = len(repeated) > 2 * near and _exceeds_chance(len(repeated), chance, len(after))
    significant = (
        too_many and chance < _MAX_CHANCE and _uniform_probability(routes, layers) < _MAX_UNIFORM_CHANCE
    )
    return np.sort(repeated) if significant else repeated[:0]


def uniform_rows(routes: RecordedRoutes, used_TL: np.ndarray, fixed: frozenset[int]) -> np.ndarray:
    """Return rows with the same ids in all of several layers, if there are more than by chance."""
    ids_TLK: np.ndarray = routes.expert_ids
    layers = [layer for layer in range(ids_TLK.shape[1]) if layer not in fixed]
    if len(layers) < 2 or not len(ids_TLK):
        return np.zeros(0, np.int64)
    equal: np.ndarray = np.all(used_TL[:, layers], axis=1, keepdims=True)[:, 0]
    for layer in layers[1:]:
        equal &= (ids_TLK[:, layer] == ids_TLK[:, layers[0]]).all(1)
    shuffled = np.ones(len(ids_TLK))
    for layer in layers[1:]:  # share of this layer's rows that equal a given row of the first layer
        shuffled *= _share_of_equal_rows(ids_TLK[:, layers[0]], ids_TLK[:, layer])
    rows = np.flatnonzero(equal)
    uniform = _uniform_probability(routes, layers[1:])
    chance = max(uniform, float(shuffled[~equal].mean())) if len(rows) < len(equal) else uniform
    return (
        rows if chance < _MAX_UNIFORM_CHANCE and _exceeds_chance(len(rows), chance, len(equal)) else rows[:0]
    )


def _uniform_probability(routes: RecordedRoutes, layers: list[int]) -> float:
    """Return the probability that two rows agree in these layers if all choices are equally likely."""
    return 1 / prod(max(1, perm(routes.num_experts[layer], routes.top_k[layer])) for layer in layers)


def _pairs(routes: RecordedRoutes, used: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of tokens, and those of the tokens after them."""
    order = TokenOrder.of(routes)
    if order.known.all():
        follows = order.follows[1:] & used[order.rows[1:]] & used[order.rows[:-1]]
        return order.rows[:-1][follows], order.rows[1:][follows]
    rows = np.flatnonzero(used)
    return rows[:-1], rows[1:]


def _differing(rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Count the slots that differ in each pair, in chunks that fit a cache."""
    differing = np.empty(len(before), np.int32)
    for start in range(0, len(before), 1 << 14):
        piece = slice(start, start + (1 << 14))
        differing[piece] = np.count_nonzero(rows[before[piece]] != rows[after[piece]], axis=1)
    return differing


def _agreement(rows: np.ndarray) -> float:
    """Return the probability that two random rows are equal."""
    if len(rows) < 2:
        return 0.0
    _, counts = np.unique(_hashed(rows), return_counts=True)
    pairs = len(rows) * (len(rows) - 1)
    return float((counts * (counts - 1.0)).sum() / pairs)


def _hashed(rows: np.ndarray) -> np.ndarray:
    factors: Any = np.random.default_rng(0).integers(1, 1 << 62, rows.shape[1])
    hashed: Any = np.zeros(len(rows), np.uint64)
    for column in range(rows.shape[1]):
        hashed += rows[:, column].astype(np.uint64) * np.uint64(2 * int(factors[column]) + 1)
    return hashed


def _share_of_equal_rows(ids_TK: np.ndarray, other_TK: np.ndarray) -> np.ndarray:
    """Return for each row of the first the share of the second's rows that equal it, [T]."""
    hashes = _hashed(np.concatenate([ids_TK, other_TK]))
    _, places = np.unique(hashes, return_inverse=True)
    counts = np.bincount(places[len(ids_TK) :], minlength=int(places.max()) + 1)
    share: np.ndarray = counts[places[: len(ids_TK)]] / len(ids_TK)
    return share


def _exceeds_chance(count: int, chance: float, total: int) -> bool:
    expected = chance * total
    return count > expected + _SIGMAS * float(np.sqrt(expected * max(0.0, 1 - chance)))
