"""Routing statistics as pure tensor functions: no synchronization, data-dependent shapes or Python loops.

Shape suffixes: L router calls reduced together, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type
from moe_trace.record.forward.batch_tokens import DECODE, PADDING

# exp() of anything below is 0; clamping avoids 0 * -inf = NaN where a logit is -inf.
_SMALLEST_EXPONENT = -1e4

FLOAT_FIELDS = ("entropy", "top1_prob", "topk_mass", "z_loss", "load_x_prob")


@dataclass(frozen=True)
class PackedStats:
    """The statistics of L calls in two small tensors."""

    ints: Tensor
    """[L, E + 2 + K + 1 + 2] int64: assignments, slots of weight 0, slots out of range, k histogram,
    padding assignments, tokens with finite logits. Where phases are known, 2 E more, from `phase_counts`."""
    floats: Tensor
    """[L, 5] float32: sums over tokens with finite logits, as in `FLOAT_FIELDS`; the last is the sum over
    experts of (slots that chose it) x (its softmax probability, summed over those tokens)."""


def routing_stats(
    logits_LTE: Tensor | None,
    weights_LTK: Tensor,
    index_LTK: Tensor,
    num_experts: int,
    padding_LT: Tensor | None,
) -> PackedStats:
    """Reduce L calls of one shape.

    Args:
        logits_LTE: [L, T, E] logits of any float type, or None if the routers have no true logits.
        weights_LTK: [L, T, K] gating weights.
        index_LTK: [L, T, K] expert ids.
        num_experts: E.
        padding_LT: [L, T] bool, True for padding tokens, or uint8 phases; None if unknown.
    """
    slots_LN = _slot_ids(index_LTK, weights_LTK, num_experts).flatten(1)
    used_LTK = (slots_LN < num_experts).view_as(index_LTK)
    counts_LX = count_per_row(slots_LN, num_experts + 2)
    ints = [
        counts_LX,
        _k_histogram(used_LTK),
        _padding_assignments(used_LTK, padding_LT),
    ]
    if logits_LTE is None:
        finite_L1 = index_LTK.new_zeros((len(index_LTK), 1), dtype=torch.int64)
        floats = torch.zeros((len(index_LTK), len(FLOAT_FIELDS)), device=index_LTK.device)
    else:
        finite_L1, floats = _logit_sums(logits_LTE, index_LTK, used_LTK, counts_LX[:, :num_experts])
    ints.append(finite_L1)
    if padding_LT is not None and padding_LT.dtype == torch.uint8:
        ints.append(phase_counts(index_LTK, weights_LTK, padding_LT, num_experts))
    return PackedStats(torch.cat(ints, dim=-1), floats)


def _slot_ids(index_LTK: Tensor, weights_LTK: Tensor, num_experts: int) -> Tensor:
    """Return the expert id of each slot; E if its weight is 0; E + 1 if its index is out of range."""
    ids = index_LTK.masked_fill(weights_LTK == 0, num_experts)
    return ids.masked_fill_((index_LTK < 0) | (index_LTK >= num_experts), num_experts + 1)


def count_per_row(ids_LN: Tensor, bins: int) -> Tensor:
    """Return the integer histogram [L, bins] of each row's ids, all within [0, bins)."""
    rows = ids_LN.shape[0]
    flat = ids_LN.flatten()
    if rows > 1:
        offsets = torch.arange(0, rows * bins, bins, device=ids_LN.device).unsqueeze(-1)
        flat = (ids_LN + offsets).flatten()
    # The size of bincount's output depends on data, which a compiler cannot handle.
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.bincount(flat, minlength=rows * bins).view(rows, bins)
    if flat.device.type == "cuda" and not torch.compiler.is_compiling():
        # bincount synchronizes; histc with fixed bounds does not, and takes half the time of scatter_add_.
        return torch.histc(flat, bins=rows * bins, min=0, max=rows * bins).view(rows, bins)
    flat = flat.long()  # while Dynamo traces, scatter_add_ and gather accept int64 only
    counts = torch.zeros(rows * bins, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(rows, bins)


def _k_histogram(used_LTK: Tensor) -> Tensor:
    """Count tokens by number of used slots, [L, K + 1]; for few bins, comparing is faster than scattering."""
    bins = torch.arange(used_LTK.shape[-1] + 1, device=used_LTK.device)
    return (used_LTK.sum(-1, keepdim=True) == bins).sum(1)


def _padding_assignments(used_LTK: Tensor, padding_LT: Tensor | None) -> Tensor:
    if padding_LT is None:
        return used_LTK.new_zeros((used_LTK.shape[0], 1), dtype=torch.int64)
    padding_LT = padding_LT == PADDING if padding_LT.dtype == torch.uint8 else padding_LT
    return (used_LTK & padding_LT.unsqueeze(-1)).sum((-1, -2)).unsqueeze(-1)


def phase_counts(index_LTK: Tensor, weights_LTK: Tensor, phases_LT: Tensor, num_experts: int) -> Tensor:
    """Count the assignments of prefill tokens, then those of decode tokens, by expert: [L, 2 E].

    Args:
        phases_LT: [L, T] uint8.
    """
    slots_LTK = _slot_ids(index_LTK, weights_LTK, num_experts)
    decodes_LT1 = (phases_LT == DECODE).unsqueeze(-1)
    uncounted = (slots_LTK >= num_experts) | (phases_LT == PADDING).unsqueeze(-1)
    ids_LTK = (slots_LTK + num_experts * decodes_LT1).masked_fill(uncounted, 2 * num_experts)
    return count_per_row(ids_LTK.flatten(1), 2 * num_experts + 1)[:, :-1]


def _logit_sums(
    logits_LTE: Tensor, index_LTK: Tensor, used_LTK: Tensor, counts_LE: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the number [L, 1] of tokens with finite logits, and the sums [L, 5] over them.

    With the largest logit m and the largest probability q, logsumexp = m - ln q.
    """
    dtype = torch.float64 if logits_LTE.dtype == torch.float64 else torch.float32
    probs_LTE = logits_LTE.softmax(-1, dtype=dtype)
    max_LT1 = logits_LTE.amax(-1, keepdim=True)
    top1_LT = probs_LTE.amax(-1)
    chosen_LTK = probs_LTE.gather(-1, index_LTK.clamp(0, logits_LTE.shape[-1] - 1).long())
    logsumexp_LT = max_LT1.squeeze(-1) - top1_LT.log()
    figures = torch.stack(
        [
            _entropy(logits_LTE, max_LT1, probs_LTE, top1_LT),
            top1_LT,
            (chosen_LTK * used_LTK).sum(-1),
            logsumexp_LT.square(),
        ],
        dim=-1,
    )
    finite_LT1 = logsumexp_LT.isfinite().unsqueeze(-1)
    sums_LF = figures.masked_fill_(~finite_LT1, 0.0).sum(1, dtype=torch.float32)
    prob_sum_LE = probs_LTE.masked_fill_(~finite_LT1, 0.0).sum(1, dtype=torch.float32)
    experts = min(counts_LE.shape[-1], prob_sum_LE.shape[-1])
    load_x_prob_L1 = (counts_LE[:, :experts] * prob_sum_LE[:, :experts]).sum(-1, keepdim=True)
    return finite_LT1.sum(1), torch.cat([sums_LF, load_x_prob_L1], dim=-1)


def _entropy(logits_LTE: Tensor, max_LT1: Tensor, probs_LTE: Tensor, top1_LT: Tensor) -> Tensor:
    """Return the entropy of each token's softmax in nats, by the formula that is fastest on the device.

    On the CPU: ln S - sum p (x - m) with S = 1 / q, whose terms have the same sign and do not cancel.
    """
    if logits_LTE.device.type != "cpu":
        return torch.special.entr(probs_LTE).sum(-1)
    shifted_LTE = (logits_LTE.to(probs_LTE.dtype) - max_LT1).clamp_(min=_SMALLEST_EXPONENT)
    return -(top1_LT.log() + (probs_LTE * shifted_LTE).sum(-1))


def small_ids(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Cast expert ids to uint8, or to int16 with the bits of uint16; all bits are set for skipped slots.

    As in the samples, slots are skipped if their id is out of range or their weight is 0.
    """
    one_byte = id_type(num_experts) == np.uint8
    skipped = (index < 0) | (index >= num_experts) | (weights == 0)
    return index.masked_fill(skipped, 255 if one_byte else -1).to(torch.uint8 if one_byte else torch.int16)
