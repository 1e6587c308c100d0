"""Expert ids in as few bytes as hold them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type


def small_ids(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """uint8, or int16 whose bits are those of uint16; all bits set where a slot was skipped.

    Skipped is what the samples count as skipped: ids out of range, and slots of weight 0.
    """
    small = id_type(num_experts) == np.uint8
    skipped = (index < 0) | (index >= num_experts) | (weights == 0)
    return index.masked_fill(skipped, 255 if small else -1).to(torch.uint8 if small else torch.int16)
