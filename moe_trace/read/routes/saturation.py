"""What two routings of the same tokens share, and router saturation: how early in training choices settle.

    saturation(t) = mean over tokens x of |top_k of checkpoint t (x) and top_k of the last checkpoint (x)| / k

for the same tokens under several checkpoints (OLMoE, arXiv 2409.02060, section 5.1): the overlap of
`moe-trace routes diff`. Uniform routing gives k / E. Top 1 compares the first slots alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.sets import Floats, Ints, expert_sets, sizes


@dataclass(frozen=True, eq=False)
class Saturation:
    """Checkpoints in the order given, each against the last."""

    labels: tuple[str, ...]
    """The C files."""
    top_k: Floats
    """[C, L] share of the last checkpoint's experts that this one chose, too; 1 for the last."""
    top_1: Floats
    """[C, L] share of tokens whose first slot is the same."""
    uniform: Floats
    """[L] k / E."""


def same_tokens(parts: Sequence[RecordedRoutes]) -> bool:
    """Whether the rows of several files are the same tokens, as far as was recorded: equally many, with the
    same padding, positions and token ids, in layers of the same paths."""
    first = parts[0]
    for part in parts[1:]:
        if len(part) != len(first) or part.layers != first.layers or part.top_k != first.top_k:
            return False
        for name in ("padding", "position", "token_ids"):
            mine, other = getattr(first, name), getattr(part, name)
            if (mine is None) != (other is None) or (mine is not None and not np.array_equal(mine, other)):
                return False
    return len(parts) > 1


def saturation(parts: Sequence[RecordedRoutes], labels: Sequence[str], rows: Ints) -> Saturation:
    """Of files that hold the same tokens.

    Args:
        rows: the rows that count.
    """
    last, layers = parts[-1], range(len(parts[-1].layers))
    figures_CL2 = np.array([[_compared(part, last, layer, rows) for layer in layers] for part in parts])
    top_k, top_1 = np.moveaxis(figures_CL2.reshape(len(parts), len(layers), 2), 2, 0)
    uniform = np.array(last.top_k) / np.array(last.num_experts)
    return Saturation(tuple(labels), top_k, top_1, uniform)


def _compared(part: RecordedRoutes, last: RecordedRoutes, layer: int, rows: Ints) -> tuple[float, float]:
    """Of the tokens that `compare_routes` compares: its overlap, and equal first slots."""
    found = compare_layer(part, rows, last, rows, (layer, layer))
    if not found.compared.any():
        return float("nan"), float("nan")
    mine, final = (one.expert_ids[rows, layer, 0] for one in (part, last))
    same = (mine == final) & (final < last.num_experts[layer])
    return float(found.overlap[found.compared].mean()), float(same[found.compared].mean())


def shared_experts(a_NK: np.ndarray, b_NK: np.ndarray, experts: int) -> Ints:
    """[N] experts that are in both rows' top k, whatever their order.

    Args:
        a_NK, b_NK: ids of the same tokens, of any two numbers of slots; ids from `experts` on are no expert.
    """
    shared_N = np.empty(len(a_NK), np.int64)
    for start in range(0, len(a_NK), 1 << 16):
        part = slice(start, start + (1 << 16))
        shared_N[part] = sizes(expert_sets(a_NK[part], experts) & expert_sets(b_NK[part], experts))
    return shared_N


@dataclass(frozen=True, eq=False)
class LayerOverlap:
    """Of n tokens in one layer."""

    compared: np.ndarray
    """[n] bool: tokens that have an expert in either, and whose call was lost in neither."""
    overlap: np.ndarray
    """[n] float: |A ∩ B| / max(|A|, |B|), which is k where no slot was skipped; 0 where not compared."""
    same_rank: np.ndarray
    """[n] float: ranks with the same expert, over the same."""


def compare_layer(
    a: RecordedRoutes, rows_a: np.ndarray, b: RecordedRoutes, rows_b: np.ndarray, layers: tuple[int, int]
) -> LayerOverlap:
    """Rows of a layer against the same tokens' rows of the other's."""
    experts, slots = a.num_experts[layers[0]], a.top_k[layers[0]]
    one, two = a.expert_ids[rows_a, layers[0], :slots], b.expert_ids[rows_b, layers[1], :slots]
    size = np.maximum(np.count_nonzero(one < experts, axis=1), np.count_nonzero(two < experts, axis=1))
    compared = size > 0
    for routes, rows, layer in ((a, rows_a, layers[0]), (b, rows_b, layers[1])):
        if routes.lost_layers is not None:
            compared &= ~routes.lost_layers[rows, layer]
    divisor = np.where(compared, size, np.inf)
    same = np.count_nonzero((one == two) & (one < experts), axis=1)
    return LayerOverlap(compared, shared_experts(one, two, experts) / divisor, same / divisor)
