"""Match the tokens (rows) and the routers (layers) of two recordings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes


@dataclass(frozen=True, eq=False)
class Alignment:
    """The N tokens and M layers that both recordings have."""

    rows_a: np.ndarray
    """[N] rows of the first."""
    rows_b: np.ndarray
    """[N] rows of the same tokens in the second."""
    layers: tuple[tuple[int, int], ...]
    """(layer of the first, layer of the second)"""
    aligned_by: str
    """Description of the columns by which the tokens are matched."""
    only_a: int
    """Number of tokens without a counterpart; padding and recomputed tokens never count."""
    only_b: int


def align(a: RecordedRoutes, b: RecordedRoutes) -> Alignment:
    """Match tokens that are neither padding nor recomputed, by sequence and position, else by order.

    A sequence number that restarts from an earlier position is another text: its n-th occurrence in one
    recording matches the n-th in the other.

    Raises:
        UsageError: Fewer than half of the smaller side's tokens have a counterpart, their token ids differ,
            or no layer is in both.
    """
    layers = _layers(a, b)
    rows_a, rows_b = np.flatnonzero(a.counted), np.flatnonzero(b.counted)
    counts = len(rows_a), len(rows_b)
    if _has_positions(a, rows_a) and _has_positions(b, rows_b):
        matched_by = "sequence and position"
        rows_a, rows_b = _match_rows(a, rows_a, b, rows_b)
    elif counts[0] == counts[1]:
        matched_by = "the order of the rows alone"
    else:
        raise UsageError(
            f"found {counts[0]:,} tokens and {counts[1]:,}, without sequences and positions to match by; "
            "expected routes of the same tokens. Give both the same prompts, or record positions"
        )
    if not len(rows_a) or 2 * len(rows_a) < min(counts):
        raise UsageError(
            f"found {len(rows_a):,} tokens of the same sequence and position among {counts[0]:,} and "
            f"{counts[1]:,}; expected routes of the same tokens. Give both the same prompts and batches"
        )
    if a.token_ids is not None and b.token_ids is not None:
        matched_by = f"token ids, {matched_by}"
        _check_token_ids(a, rows_a, b, rows_b)
    return Alignment(rows_a, rows_b, layers, matched_by, counts[0] - len(rows_a), counts[1] - len(rows_b))


def _has_positions(routes: RecordedRoutes, rows: np.ndarray) -> bool:
    return bool(((routes.sequence[rows] != UNKNOWN) & (routes.position[rows] != UNKNOWN)).all())


def _match_rows(
    a: RecordedRoutes, rows_a: np.ndarray, b: RecordedRoutes, rows_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the same text and position, in the order of the first."""
    keys_a, keys_b = _keys(a, rows_a), _keys(b, rows_b)
    if len(keys_a) == len(keys_b) and (keys_a == keys_b).all():
        return rows_a, rows_b
    kind = np.dtype([("sequence", "i8"), ("text", "i8"), ("position", "i8")])
    records_a, records_b = (np.ascontiguousarray(keys).view(kind).ravel() for keys in (keys_a, keys_b))
    _, places_a, places_b = np.intersect1d(records_a, records_b, return_indices=True)
    order = np.argsort(places_a)
    return rows_a[places_a[order]], rows_b[places_b[order]]


def _keys(routes: RecordedRoutes, rows: np.ndarray) -> np.ndarray:
    """Return sequence, number of earlier starts of it, and position, int64 [N, 3]."""
    order = np.argsort(routes.sequence[rows], kind="stable")
    sequence, position = routes.sequence[rows][order].astype(np.int64), routes.position[rows][order]
    new = np.ones(len(rows), np.bool_)
    new[1:] = sequence[1:] != sequence[:-1]
    starts = new.copy()
    starts[1:] |= position[1:] <= position[:-1]
    started = np.cumsum(starts)
    text: np.ndarray = started - np.maximum.accumulate(np.where(new, started, 0))
    keys = np.empty((len(rows), 3), np.int64)
    keys[order] = np.stack([sequence, text, position], axis=1)
    return keys


def _check_token_ids(a: RecordedRoutes, rows_a: np.ndarray, b: RecordedRoutes, rows_b: np.ndarray) -> None:
    assert a.token_ids is not None and b.token_ids is not None
    ids_a, ids_b = a.token_ids[rows_a], b.token_ids[rows_b]
    known = (ids_a != UNKNOWN) & (ids_b != UNKNOWN)
    differing = np.flatnonzero((ids_a != ids_b) & known)
    if len(differing):
        first = int(rows_a[differing[0]])
        raise UsageError(
            f"found other token ids in {len(differing):,} of {len(rows_a):,} tokens of the same place, first "
            f"in row {first} (sequence {a.sequence[first]}, position {a.position[first]}); expected routes "
            "of the same tokens. Compare runs of the same prompts, and generated text only up to its first "
            "difference"
        )


def _layers(a: RecordedRoutes, b: RecordedRoutes) -> tuple[tuple[int, int], ...]:
    places = {path: place for place, path in enumerate(b.layers)}
    pairs = [(place, places[path]) for place, path in enumerate(a.layers) if path in places]
    if not pairs and len(a.layers) == len(b.layers):
        pairs = [(place, place) for place in range(len(a.layers))]
    if not pairs:
        raise UsageError(
            f"found {len(a.layers)} layers and {len(b.layers)} of other names; expected some that both have. "
            "Compare routes of the same model"
        )
    for own, other in pairs:
        sizes = (a.num_experts[own], a.top_k[own]), (b.num_experts[other], b.top_k[other])
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"found {sizes[0][0]} experts, top-{sizes[0][1]}, and {sizes[1][0]} experts, "
                f"top-{sizes[1][1]}, in {a.layers[own]}; expected the same. Compare routes of the same model"
            )
    return tuple(pairs)
