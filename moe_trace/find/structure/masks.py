"""Decisions that are written as a mask over all experts.

    Megatron-core        (probabilities [T, E], routing map [T, E] of booleans), after capacity drops
    DeepSpeed, GShard    (loss, combine weights [T, E, C], dispatch mask [T, E, C], counts [E])

A slot of a token that capacity dropped has the id E, which is no expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts.contract import AdapterMismatch
from moe_trace.find.contracts.modules import described
from moe_trace.find.contracts.overhead_range import overhead_range
from moe_trace.find.structure.index_and_weights import Decision


def read_masks(parts: Sequence[Any], num_experts: int, top_k: int) -> Decision | None:
    """The decision in the parts of an output; None where they hold no mask over the experts.

    Args:
        top_k: K, the slots of a token; the mask may have fewer.

    Raises:
        AdapterMismatch: there is a mask, and K or the weights are unknown.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    masks = [t for t in tensors if t.dtype == torch.bool and t.dim() in (2, 3) and t.shape[1] == num_experts]
    if not masks:
        return None
    weights = [t for t in tensors if t.is_floating_point() and t.shape == masks[0].shape]
    if len(masks) > 1 or len(weights) != 1 or not 0 < top_k <= num_experts:
        raise AdapterMismatch(
            f"expected one mask and weights of its shape over {num_experts} experts, and a top-k that the "
            f"router tells, found {described(tuple(parts))} and top-k {top_k or 'unknown'}"
        )
    with overhead_range():
        chosen_TE, weights_TE = masks[0], weights[0]
        if chosen_TE.dim() == 3:  # a column for each place of an expert's capacity, at most one of them set
            chosen_TE, weights_TE = chosen_TE.any(-1), weights_TE.sum(-1)
        lowest = torch.finfo(weights_TE.dtype).min
        weights_TK, index_TK = weights_TE.masked_fill(~chosen_TE, lowest).topk(top_k, dim=-1)
        kept_TK = chosen_TE.gather(1, index_TK)
        return Decision(index_TK.masked_fill(~kept_TK, num_experts), weights_TK.masked_fill(~kept_TK, 0))
