"""Parsing of router outputs: expert ids, K per token, with weights of the same shape, in one of the forms

    torchtitan            (weights [B, L, K], ids [B, L, K], scores [B, L, E]), flattened in newer versions
    OLMo-core             (weights, ids, tokens per expert [E], loss)
    NeMo Automodel        (weights, ids, loss or None)
    DeepSpeed AutoEP      (weights, ids, tokens per expert)
    DeepSeek's MoEGate    (ids, weights[, loss])
    megablocks, Nomic     (scores [T, E], weights, ids), in one order or the other
    DeepSpeed TopKGate    (loss, C, E, ids [K, T], locations [K, T], weights [K, T], counts); -1: dropped

A count vector [E] in the output is never the source: DeepSpeed's includes what the capacity then drops.

Or a mask over all experts; slots of tokens dropped by the capacity get the id E, which is no expert:

    Megatron-core         (probabilities [T, E], routing map [T, E] of booleans), after capacity drops
    DeepSpeed, GShard     (loss, combine weights [T, E, C], dispatch mask [T, E, C], counts [E])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts.contract import AdapterMismatch
from moe_trace.find.contracts.modules import described
from moe_trace.find.contracts.overhead_range import overhead_range

MASK_ARGUMENT = "token_mask"
"""Argument [T] of the experts in NeMo Automodel, True for tokens that are not masked out."""


@dataclass(frozen=True)
class Decision:
    """Expert ids and weights, one row per token."""

    index_TK: Tensor
    weights_TK: Tensor

    def without(self, counted: Any, num_experts: int) -> Decision:
        """Skip the tokens outside the mask `counted` [T]; change nothing if it is no boolean tensor."""
        index = self.index_TK
        if not isinstance(counted, Tensor) or counted.dtype != torch.bool:
            return self
        if counted.numel() != index.shape[0]:
            raise AdapterMismatch(
                f"expected a mask of {index.shape[0]} tokens, found {described(counted)} beside ids "
                f"{described(index)}"
            )
        with overhead_range():
            index = index.masked_fill(~counted.reshape(-1, 1), num_experts)
        return Decision(index, self.weights_TK)


def read_index(parts: Sequence[Any], num_experts: int, *, one_each: bool = False) -> Decision | None:
    """Read ids and weights from the parts of an output or the arguments of a call; None if there are no ids.

    Args:
        one_each: whether ids may have shape [T], as returned by routers with one expert per token.

    Raises:
        AdapterMismatch: there are ids, but the weights that belong to them are ambiguous or missing.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if one_each and _has_one_per_token(tensors, num_experts):
        tensors = [t.unsqueeze(-1) for t in tensors if t.dim() == 1]
    ids = [t for t in tensors if t.dim() >= 2 and _is_integer(t)]
    if len(ids) == 2 and len(parts) == 7 and parts[2] == num_experts:
        return _capacity_routes(parts)
    if not ids:
        return None
    if len(ids) > 1:
        raise AdapterMismatch(f"expected one tensor of expert ids, found {described(tuple(parts))}")
    floats = [t for t in tensors if t.is_floating_point()]
    weights = [t for t in floats if t.shape == ids[0].shape]
    dense = [t for t in floats if t.shape == (*ids[0].shape[:-1], num_experts)]
    index = ids[0].flatten(0, -2)
    if len(weights) == 1:
        return Decision(index, weights[0].flatten(0, -2))
    if not weights and len(dense) == 1:
        with overhead_range():
            chosen = dense[0].flatten(0, -2).gather(1, index.long().clamp(0, num_experts - 1))
        return Decision(index, chosen)
    raise AdapterMismatch(
        f"expected one float tensor of the ids' shape {list(ids[0].shape)}, or over all {num_experts} "
        f"experts, found {described(tuple(parts))}"
    )


def told_counts(parts: Sequence[Any], num_experts: int) -> Tensor | None:
    """Return the tokens per expert [E] if a router seems to return them, else None."""
    vectors = [part for part in parts if isinstance(part, Tensor) and part.shape == (num_experts,)]
    return vectors[0].detach() if len(vectors) == 1 and not vectors[0].requires_grad else None


def _has_one_per_token(tensors: Sequence[Tensor], num_experts: int) -> bool:
    """Return whether there are ids [T] and weights [T] that cannot be statistics [E] of the experts."""
    vectors = [t for t in tensors if t.dim() == 1]
    if len(vectors) != 2 or vectors[0].shape != vectors[1].shape or sum(map(_is_integer, tensors)) != 1:
        return False
    return any(map(_is_integer, vectors)) and (vectors[0].numel() != num_experts or len(tensors) == 2)


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _capacity_routes(parts: Sequence[Any]) -> Decision:
    """Read DeepSpeed's sparse routes [K, T], in which dropped tokens have negative ids."""
    index, locations, weights = parts[3], parts[4], parts[5]
    if not (index.shape == locations.shape == weights.shape) or index.dim() != 2:
        raise AdapterMismatch(
            f"expected ids, locations and weights of one shape [K, T], found {described(tuple(parts))}"
        )
    return Decision(index.t(), weights.t())


def read_masks(parts: Sequence[Any], num_experts: int, top_k: int) -> Decision | None:
    """Read ids and weights from a mask in the parts of an output; None if there is no mask over the experts.

    Args:
        top_k: K, the slots per token; the mask may have fewer.

    Raises:
        AdapterMismatch: there is a mask, but K or the weights are unknown.
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
