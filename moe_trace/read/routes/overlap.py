"""The overlap of two routings of the same tokens: what `routes diff` and saturation are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.sets import expert_sets, sizes


def shared_experts(a_NK: np.ndarray, b_NK: np.ndarray, experts: int) -> npt.NDArray[np.int64]:
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
