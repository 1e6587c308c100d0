"""Routing figures as pure tensor functions: no synchronisation, no data-dependent shape, no Python loop.

Shape suffixes: L router calls reduced together, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp() of anything below is 0 in float32; the clamp keeps 0 * -inf = NaN away where a logit is -inf.
_SMALLEST_EXPONENT = -1e4

FLOAT_FIELDS = ("entropy", "top1_prob", "topk_mass", "z_loss")


@dataclass(frozen=True)
class PackedStats:
    """The figures of L calls in two small tensors, as `unpack_ints` and `FLOAT_FIELDS` name them."""

    ints: Tensor
    """[L, E + 2 + K + 1 + 2] int64: assignments, slots of weight 0, slots out of range, k histogram,
    padding assignments, tokens with finite logits."""
    floats: Tensor
    """[L, 4] float32: sums over the finite tokens, in the order of `FLOAT_FIELDS`."""


def routing_stats(
    logits_LTE: Tensor | None,
    weights_LTK: Tensor,
    index_LTK: Tensor,
    num_experts: int,
    padding_T: Tensor | None,
) -> PackedStats:
    """Reduce L calls of one shape.

    Args:
        logits_LTE: [L, T, E] any float type, or None where the routers have no true logits.
        weights_LTK: [L, T, K] what scales each slot's output.
        index_LTK: [L, T, K] expert ids.
        num_experts: E.
        padding_T: [T] bool, True for padding tokens; None if it is not known.
    """
    slots = _slot_ids(index_LTK, weights_LTK, num_experts)
    used_LTK = slots < num_experts
    ints = [
        count_per_row(slots.flatten(1), num_experts + 2),
        count_per_row(used_LTK.sum(-1), index_LTK.shape[-1] + 1),
        _padding_assignments(used_LTK, padding_T),
    ]
    if logits_LTE is None:
        finite_L, floats = _no_logits(index_LTK)
    else:
        finite_L, floats = _logit_sums(logits_LTE, index_LTK, used_LTK)
    return PackedStats(torch.cat([*ints, finite_L], dim=-1), floats)


def _slot_ids(index_LTK: Tensor, weights_LTK: Tensor, num_experts: int) -> Tensor:
    """Expert id of each slot; E where its weight is 0; E + 1 where its index is out of range."""
    in_range = (index_LTK >= 0) & (index_LTK < num_experts)
    ids = torch.where(weights_LTK != 0, index_LTK, num_experts)
    return torch.where(in_range, ids, num_experts + 1)


def count_per_row(ids_LN: Tensor, bins: int) -> Tensor:
    """[L, bins] int64 histogram of each row's ids, all within [0, bins)."""
    rows = ids_LN.shape[0]
    offsets = torch.arange(0, rows * bins, bins, device=ids_LN.device).unsqueeze(-1)
    flat = (ids_LN + offsets).flatten()
    if flat.device.type == "cpu":
        return torch.bincount(flat, minlength=rows * bins).view(rows, bins)
    # bincount waits for the device; scatter_add_ with a fixed size does not.
    counts = torch.zeros(rows * bins, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(rows, bins)


def _padding_assignments(used_LTK: Tensor, padding_T: Tensor | None) -> Tensor:
    if padding_T is None:
        return used_LTK.new_zeros((used_LTK.shape[0], 1), dtype=torch.int64)
    return (used_LTK & padding_T[:, None]).sum((-1, -2)).unsqueeze(-1)


def _no_logits(index_LTK: Tensor) -> tuple[Tensor, Tensor]:
    rows = index_LTK.shape[0]
    finite = torch.zeros((rows, 1), dtype=torch.int64, device=index_LTK.device)
    return finite, torch.zeros((rows, len(FLOAT_FIELDS)), device=index_LTK.device)


def _logit_sums(logits_LTE: Tensor, index_LTK: Tensor, used_LTK: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens with finite logits, and their number.

    With x' = x - max and S = sum exp x': H = ln S - sum(exp(x') x') / S, two terms of one sign, so that
    nothing cancels; top-1 probability 1 / S; logsumexp = max + ln S.
    """
    if logits_LTE.dtype != torch.float64:
        logits_LTE = logits_LTE.float()
    max_LT1 = logits_LTE.amax(-1, keepdim=True)
    shifted = (logits_LTE - max_LT1).clamp_(min=_SMALLEST_EXPONENT)
    exps = shifted.exp()
    total_LT = exps.sum(-1)
    log_total_LT = total_LT.log()
    entropy = log_total_LT - shifted.mul_(exps).sum(-1) / total_LT
    chosen = exps.gather(-1, index_LTK.clamp(0, exps.shape[-1] - 1)).mul_(used_LTK).sum(-1)
    logsumexp = max_LT1.squeeze(-1) + log_total_LT
    figures = torch.stack([entropy, total_LT.reciprocal(), chosen / total_LT, logsumexp.square()], dim=-1)
    finite_LT1 = logsumexp.isfinite().unsqueeze(-1)
    sums = torch.where(finite_LT1, figures, 0.0).sum(1, dtype=torch.float32)
    return finite_LT1.sum(1), sums
