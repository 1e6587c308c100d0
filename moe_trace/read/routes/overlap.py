"""How many experts two routings of the same tokens share: the kernel of `routes diff` and of saturation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
