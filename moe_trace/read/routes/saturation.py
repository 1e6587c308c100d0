"""Overlap of two routings of the same tokens, and router saturation: how early in training choices settle.

    saturation(t) = mean over tokens x of |top_k of checkpoint t (x) and top_k of the last checkpoint (x)| / k

for the same tokens under several checkpoints (OLMoE, arXiv 2409.02060, section 5.1): the overlap of
`moe-trace routes diff`. Uniform routing gives k / E. Top 1 compares only the first slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.sets import Floats, Ints, expert_sets, sizes


@dataclass(frozen=True, eq=False)
class Saturation:
    """Saturation of checkpoints in the given order, each compared with the last."""

    labels: tuple[str, ...]
    """Names of the C files."""
    top_k: Floats
    """[C, L] share of the last checkpoint's experts that this one also chose; 1 for the last."""
    top_1: Floats
    """[C, L] share of tokens with the same expert in the first slot."""
    uniform: Floats
    """[L] value for uniform routing, k / E."""


def same_tokens(parts: Sequence[RecordedRoutes]) -> bool:
    """Return whether several files hold the same tokens, as far as recorded: in number, padding, positions,
    token ids, layer paths and top-k."""
    first = parts[0]
    for part in parts[1:]:
        if len(part) != len(first) or part.layers != first.layers or part.top_k != first.top_k:
            return False
        for name in ("padding", "position", "token_ids"):
            expected, found = getattr(first, name), getattr(part, name)
            if (expected is None) != (found is None) or (
                expected is not None and not np.array_equal(expected, found)
            ):
                return False
    return len(parts) > 1


def saturation(parts: Sequence[RecordedRoutes], labels: Sequence[str], rows: Ints) -> Saturation:
    """Compute the saturation of files with the same tokens.

    Args:
        rows: Rows that count.
    """
    last, layers = parts[-1], range(len(parts[-1].layers))
    figures_CL2 = np.array([[_compared(part, last, layer, rows) for layer in layers] for part in parts])
    top_k, top_1 = np.moveaxis(figures_CL2.reshape(len(parts), len(layers), 2), 2, 0)
    uniform = np.array(last.top_k) / np.array(last.num_experts)
    return Saturation(tuple(labels), top_k, top_1, uniform)


def _compared(part: RecordedRoutes, last: RecordedRoutes, layer: int, rows: Ints) -> tuple[float, float]:
    """Return the mean overlap and the share of equal first slots, over the tokens of `compare_routes`."""
    found = compare_layer(part, rows, last, rows, (layer, layer))
    if not found.compared.any():
        return float("nan"), float("nan")
    first_slots, last_slots = (routes.expert_ids[rows, layer, 0] for routes in (part, last))
    same = (first_slots == last_slots) & (last_slots < last.num_experts[layer])
    return float(found.overlap[found.compared].mean()), float(same[found.compared].mean())


def shared_experts(a_NK: np.ndarray, b_NK: np.ndarray, experts: int) -> Ints:
    """Return the number of experts in both rows' top k, [N], regardless of their order.

    Args:
        a_NK, b_NK: Ids of the same tokens, with any numbers of slots; ids from `experts` on are no expert.
    """
    shared_N = np.empty(len(a_NK), np.int64)
    for start in range(0, len(a_NK), 1 << 16):
        part = slice(start, start + (1 << 16))
        shared_N[part] = sizes(expert_sets(a_NK[part], experts) & expert_sets(b_NK[part], experts))
    return shared_N


@dataclass(frozen=True, eq=False)
class LayerOverlap:
    """Overlap of n tokens in one layer."""

    compared: np.ndarray
    """[n] bool: tokens with an expert in either, and whose call was lost in neither."""
    overlap: np.ndarray
    """[n] float: |A ∩ B| / max(|A|, |B|), which is k if no slot was skipped; 0 where not compared."""
    same_rank: np.ndarray
    """[n] float: number of ranks with the same expert, over the same."""


def compare_layer(
    a: RecordedRoutes, rows_a: np.ndarray, b: RecordedRoutes, rows_b: np.ndarray, layers: tuple[int, int]
) -> LayerOverlap:
    """Compare the rows of a layer with the same tokens' rows of another recording."""
    experts, slots = a.num_experts[layers[0]], a.top_k[layers[0]]
    ids_a, ids_b = a.expert_ids[rows_a, layers[0], :slots], b.expert_ids[rows_b, layers[1], :slots]
    size = np.maximum(np.count_nonzero(ids_a < experts, axis=1), np.count_nonzero(ids_b < experts, axis=1))
    compared = size > 0
    for routes, rows, layer in ((a, rows_a, layers[0]), (b, rows_b, layers[1])):
        if routes.lost_layers is not None:
            compared &= ~routes.lost_layers[rows, layer]
    divisor = np.where(compared, size, np.inf)
    same = np.count_nonzero((ids_a == ids_b) & (ids_a < experts), axis=1)
    return LayerOverlap(compared, shared_experts(ids_a, ids_b, experts) / divisor, same / divisor)
