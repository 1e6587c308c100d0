"""Triton implementation of `stats.routing_stats` for GPUs, in two kernels instead of some 45.

The first reads each call's tensors in place, through a table of their addresses, and writes the sums of a
chunk of tokens; the second adds up the chunks in a fixed order, so that the result is deterministic. Calls
are not stacked, and the host does not synchronize. Shape suffixes as in `stats`, and C logits per token.

Only block sizes, which follow from a router's experts and slots, are compile-time constants. The number of
tokens and the data types are runtime arguments, so that no forward triggers a compilation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_trace.record.reduce.block_sizes import block_sizes
from moe_trace.record.reduce.stats import FLOAT_FIELDS, PackedStats

_SUMS = len(FLOAT_FIELDS) - 1  # the last field is computed from the sums of probabilities and the counts
_CHUNKS_MAX = 64
_PROGRAMS = 1024  # a few waves on a GPU's multiprocessors
_WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INDEX_TYPES = (torch.int64, torch.int32)
# Codes by which the kernel distinguishes types, 0 for no logits. All types are reduced in float32.
_LOGIT_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def fits(logits_TE: Tensor | None, weights_TK: Tensor, index_TK: Tensor) -> bool:
    """Return whether the kernels support a call with these types."""
    return (
        index_TK.numel() > 0
        and weights_TK.dtype in _WEIGHT_TYPES
        and index_TK.dtype in _INDEX_TYPES
        and (logits_TE is None or logits_TE.dtype in _LOGIT_TYPES)
    )


def fused_routing_stats(
    logits: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    index: Sequence[Tensor],
    num_experts: int,
    padding: Sequence[Tensor] | None,
) -> PackedStats:
    """Reduce L calls of one shape, type and device, for which `fits` holds and there are `block_sizes`.

    Args:
        logits: L tensors [T, C], or None if the routers have no true logits.
        weights: L tensors [T, K] of gating weights.
        index: L tensors [T, K] of expert ids.
        num_experts: E.
        padding: L tensors [T] bool, True for padding tokens, or uint8 phases; None if unknown.
    """
    given = (weights, index, logits or weights, padding or weights)
    kinds = [[tensor.contiguous() for tensor in kind] for kind in given]
    device, calls = kinds[1][0].device, len(index)
    tokens, top_k = index[0].shape
    classes = logits[0].shape[-1] if logits else 0
    sizes = block_sizes(num_experts, top_k, classes)
    assert sizes is not None
    chunks = max(1, min(_CHUNKS_MAX, _PROGRAMS // calls, triton.cdiv(tokens, 32)))
    columns = num_experts + 2 + top_k + 1 + 2
    addresses = _to_device([[tensor.data_ptr() for tensor in kind] for kind in kinds], device)
    parts_i = torch.empty((calls, chunks, columns), dtype=torch.int32, device=device)
    parts_f = torch.empty((calls, chunks, _SUMS + classes), dtype=torch.float32, device=device)
    ints = torch.empty((calls, columns), dtype=torch.int64, device=device)
    floats = torch.empty((calls, _SUMS + 1), dtype=torch.float32, device=device)
    _sum_chunks[(chunks, calls)](
        addresses,
        parts_i,
        parts_f,
        calls,
        tokens,
        num_experts,
        classes,
        top_k,
        triton.cdiv(tokens, chunks),
        weights[0].element_size(),
        index[0].element_size(),
        _LOGIT_TYPES[logits[0].dtype] if logits else 0,
        int(padding is not None),
        BLOCK_T=sizes.BLOCK_T,
        BLOCK_E=sizes.BLOCK_E,
        BLOCK_S=sizes.BLOCK_S,
        BLOCK_K=sizes.BLOCK_K,
        BLOCK_X=sizes.BLOCK_X,
    )
    _add_chunks[(calls,)](
        parts_i,
        parts_f,
        ints,
        floats,
        chunks,
        num_experts,
        classes,
        top_k,
        BLOCK_E=sizes.BLOCK_E,
        BLOCK_I=sizes.BLOCK_I,
        SUMS=_SUMS,
    )
    return PackedStats(ints, floats)


def _to_device(rows: list[list[int]], device: torch.device) -> Tensor:
    """Copy a table of integers from pinned memory to the device, without synchronizing."""
    table = torch.from_numpy(np.array(rows, dtype=np.int64))  # takes a third of the time of torch.tensor
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


# Triton specializes on arguments that are 1 or a multiple of 16, and would recompile for them.
_COUNTS = ("calls", "tokens", "num_experts", "classes", "top_k")
_KINDS = ("chunk_tokens", "weight_bytes", "index_bytes", "logit_kind", "has_padding")


@triton.jit
def _load_ids(address, index_bytes, offsets, mask):  # type: ignore[no-untyped-def]  # Triton's own annotations
    if index_bytes == 8:
        ids = tl.load(address.to(tl.pointer_type(tl.int64)) + offsets, mask=mask, other=0)
    else:
        ids = tl.load(address.to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0).to(tl.int64)
    return ids


@triton.jit
def _load_is_zero(address, weight_bytes, offsets, mask):  # type: ignore[no-untyped-def]
    """Return whether floats of any type are 0 or -0, that is, all bits but the sign are 0."""
    if weight_bytes == 8:
        is_zero = (tl.load(address.to(tl.pointer_type(tl.int64)) + offsets, mask=mask, other=0) << 1) == 0
    else:
        if weight_bytes == 4:
            is_zero = (tl.load(address.to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0) << 1) == 0
        else:
            halves = tl.load(address.to(tl.pointer_type(tl.int16)) + offsets, mask=mask, other=0)
            is_zero = (halves.to(tl.int32) & 0x7FFF) == 0
    return is_zero


@triton.jit
def _load_logits(address, logit_kind, offsets, mask):  # type: ignore[no-untyped-def]
    low = -float("inf")
    if logit_kind == 1:
        logits = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=low)
    else:
        if logit_kind == 2:
            narrow = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=low)
            logits = narrow.to(tl.float32)
        else:
            half = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=low)
            logits = half.to(tl.float32)
    return logits


@triton.jit(do_not_specialize=[*_COUNTS, *_KINDS])
def _sum_chunks(  # type: ignore[no-untyped-def]
    addresses,
    parts_i,
    parts_f,
    calls,
    tokens,
    num_experts,
    classes,
    top_k,
    chunk_tokens,
    weight_bytes,
    index_bytes,
    logit_kind,
    has_padding,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    chunk, call = tl.program_id(0), tl.program_id(1)
    weights, index = tl.load(addresses + call), tl.load(addresses + calls + call)
    logits, mask = tl.load(addresses + 2 * calls + call), tl.load(addresses + 3 * calls + call)
    experts_E, slots_K, bins_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    ids_X = tl.arange(0, BLOCK_X)
    counts_X = tl.zeros([BLOCK_X], tl.int32)
    histogram_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    padding_T = tl.zeros([BLOCK_T], tl.int32)
    finite_T = tl.zeros([BLOCK_T], tl.int32)
    probs_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    mass_TK = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    entropy_T = tl.zeros([BLOCK_T], tl.float32)
    top1_T = tl.zeros([BLOCK_T], tl.float32)
    z_T = tl.zeros([BLOCK_T], tl.float32)
    end = tl.minimum((chunk + 1) * chunk_tokens, tokens)
    for start in range(chunk * chunk_tokens, end, BLOCK_T):
        rows_T = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        live_T = rows_T < end
        slot_TK = rows_T[:, None] * top_k + slots_K[None, :]
        exists_TK = live_T[:, None] & (slots_K < top_k)[None, :]
        id_TK = _load_ids(index, index_bytes, slot_TK, exists_TK)
        is_zero_TK = _load_is_zero(weights, weight_bytes, slot_TK, exists_TK)
        outside_TK = (id_TK < 0) | (id_TK >= num_experts)
        id_TK = tl.where(outside_TK, num_experts + 1, tl.where(is_zero_TK, num_experts, id_TK))
        id_TK = tl.where(exists_TK, id_TK, num_experts + 2).to(tl.int32)  # the last bin is not kept
        counts_X += tl.histogram(tl.reshape(id_TK, [BLOCK_T * BLOCK_S]), BLOCK_X)
        is_used_TK = id_TK < num_experts
        used_T = tl.sum(is_used_TK.to(tl.int32), 1)
        is_count_TK = live_T[:, None] & (used_T[:, None] == bins_K[None, :])
        histogram_TK += is_count_TK.to(tl.int32)
        if has_padding != 0:
            mask_T = tl.load(mask.to(tl.pointer_type(tl.int8)) + rows_T, mask=live_T, other=0)
            is_padding_T = mask_T == 1  # `PADDING` where these are phases
            padding_T += tl.where(is_padding_T, used_T, 0)
        if logit_kind != 0:
            exists_TE = live_T[:, None] & (experts_E < classes)[None, :]
            logit_TE = rows_T[:, None] * classes + experts_E[None, :]
            logits_TE = _load_logits(logits, logit_kind, logit_TE, exists_TE)
            max_T = tl.max(logits_TE, 1)
            shifted_TE = logits_TE - max_T[:, None]
            exp_TE = tl.where(exists_TE, tl.exp(shifted_TE), 0.0)
            sum_T = tl.sum(exp_TE, 1)
            log_T = tl.log(sum_T)
            logsumexp_T = max_T + log_T
            good_T = live_T & (logsumexp_T - logsumexp_T == 0.0)  # neither NaN nor infinite
            share_T = tl.where(good_T, 1.0 / sum_T, 0.0)
            prob_TE = tl.where(good_T[:, None], exp_TE * share_T[:, None], 0.0)
            # ln S - sum p (x - m): both terms have the same sign, so they do not cancel.
            below_T = tl.sum(tl.where(prob_TE > 0.0, prob_TE * shifted_TE, 0.0), 1)
            entropy_T += tl.where(good_T, log_T - below_T, 0.0)
            top1_T += share_T
            z_T += tl.where(good_T, logsumexp_T * logsumexp_T, 0.0)
            probs_TE += prob_TE
            finite_T += good_T.to(tl.int32)
            # Reading them again from the cache is faster than selecting them from the block.
            class_TK = tl.minimum(id_TK, classes - 1)
            chosen_TK = rows_T[:, None] * classes + class_TK
            picked_TK = _load_logits(logits, logit_kind, chosen_TK, is_used_TK)
            picked_TK = tl.exp(picked_TK - max_T[:, None]) * share_T[:, None]
            mass_TK += tl.where(is_used_TK & good_T[:, None], picked_TK, 0.0)
    row = call * tl.num_programs(0) + chunk
    out_i = parts_i + row * (num_experts + top_k + 5)
    tl.store(out_i + ids_X, counts_X, mask=ids_X < num_experts + 2)
    tl.store(out_i + num_experts + 2 + bins_K, tl.sum(histogram_TK, 0), mask=bins_K <= top_k)
    tl.store(out_i + num_experts + top_k + 3, tl.sum(padding_T, 0))
    tl.store(out_i + num_experts + top_k + 4, tl.sum(finite_T, 0))
    out_f = parts_f + row * (4 + classes)
    tl.store(out_f, tl.sum(entropy_T, 0))
    tl.store(out_f + 1, tl.sum(top1_T, 0))
    tl.store(out_f + 2, tl.sum(tl.sum(mass_TK, 0), 0))
    tl.store(out_f + 3, tl.sum(z_T, 0))
    tl.store(out_f + 4 + experts_E, tl.sum(probs_TE, 0), mask=experts_E < classes)


@triton.jit(do_not_specialize=["chunks", "num_experts", "classes", "top_k"])
def _add_chunks(  # type: ignore[no-untyped-def]
    parts_i,
    parts_f,
    ints,
    floats,
    chunks,
    num_experts,
    classes,
    top_k,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SUMS: tl.constexpr,
):
    call = tl.program_id(0)
    columns = num_experts + top_k + 5
    columns_I, sums_F, experts_E = tl.arange(0, BLOCK_I), tl.arange(0, SUMS), tl.arange(0, BLOCK_E)
    total_I = tl.zeros([BLOCK_I], tl.int64)
    counts_E = tl.zeros([BLOCK_E], tl.int64)
    total_F = tl.zeros([SUMS], tl.float32)
    probs_E = tl.zeros([BLOCK_E], tl.float32)
    for chunk in range(chunks):
        row_i = parts_i + (call * chunks + chunk) * columns
        row_f = parts_f + (call * chunks + chunk) * (SUMS + classes)
        total_I += tl.load(row_i + columns_I, mask=columns_I < columns, other=0)
        counts_E += tl.load(row_i + experts_E, mask=experts_E < num_experts, other=0)
        total_F += tl.load(row_f + sums_F)
        probs_E += tl.load(row_f + SUMS + experts_E, mask=experts_E < classes, other=0.0)
    tl.store(ints + call * columns + columns_I, total_I, mask=columns_I < columns)
    tl.store(floats + call * (SUMS + 1) + sums_F, total_F)
    tl.store(floats + call * (SUMS + 1) + SUMS, tl.sum(counts_E.to(tl.float32) * probs_E, 0))
