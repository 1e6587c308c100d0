"""`stats.routing_stats` for a GPU in two kernels instead of some 45, written in Triton.

The first reads each call's tensors where they are, through a table of their addresses, and writes the sums of
a chunk of tokens; the second adds up the chunks, always in the same order, so that equal inputs give equal
figures. Nothing is copied, nothing waits. Shape suffixes as in `stats`, and C logits per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_trace.stats import FLOAT_FIELDS, PackedStats

_SUMS = len(FLOAT_FIELDS) - 1  # the last field is made of the others
_ELEMENTS = 2048  # of one block of tokens x experts, which stays in registers
_COLUMNS_MAX = 1024
_CHUNKS_MAX = 64
_PROGRAMS = 1024  # some waves of a GPU's multiprocessors
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
}
_LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # all are reduced in float32


def fits(logits_TE: Tensor | None, weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> bool:
    """Whether calls like this one can be reduced here."""
    classes = 0 if logits_TE is None else logits_TE.shape[-1]
    return (
        index_TK.numel() > 0
        and weights_TK.dtype in _TYPES
        and index_TK.dtype in _TYPES
        and (logits_TE is None or logits_TE.dtype in _LOGIT_TYPES)
        and max(classes, num_experts + 2, index_TK.shape[-1] + 1) <= _COLUMNS_MAX
    )


def fused_routing_stats(
    logits: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    index: Sequence[Tensor],
    num_experts: int,
    padding: Sequence[Tensor] | None,
) -> PackedStats:
    """Reduce L calls of one shape, type and device, for which `fits` holds.

    Args:
        logits: L tensors [T, C], or None where the routers have no true logits.
        weights: L tensors [T, K]: what scales each slot's output.
        index: L tensors [T, K]: expert ids.
        num_experts: E.
        padding: L tensors [T] bool, True for padding tokens; None if it is not known.
    """
    kinds = [_contiguous(kind) for kind in (weights, index, logits or weights, padding or weights)]
    device, calls = kinds[1][0].device, len(index)
    tokens, top_k = index[0].shape
    classes = logits[0].shape[-1] if logits else 0
    chunks = max(1, min(_CHUNKS_MAX, _PROGRAMS // calls, triton.cdiv(tokens, 32)))
    columns = num_experts + 2 + top_k + 1 + 2
    addresses = _to_device([[tensor.data_ptr() for tensor in kind] for kind in kinds], device)
    parts_i = torch.empty((calls, chunks, columns), dtype=torch.int32, device=device)
    parts_f = torch.empty((calls, chunks, _SUMS + classes), dtype=torch.float32, device=device)
    ints = torch.empty((calls, columns), dtype=torch.int64, device=device)
    floats = torch.empty((calls, _SUMS + 1), dtype=torch.float32, device=device)
    block_e = triton.next_power_of_2(max(classes, num_experts + 2))
    sizes = (tokens, num_experts, classes, top_k)
    _sum_chunks[(chunks, calls)](
        addresses,
        parts_i,
        parts_f,
        calls,
        *sizes,
        triton.cdiv(tokens, chunks),
        WEIGHT=_TYPES[weights[0].dtype],
        INDEX=_TYPES[index[0].dtype],
        LOGIT=_TYPES[logits[0].dtype] if logits else None,
        PADDING=padding is not None,
        BLOCK_T=max(1, _ELEMENTS // block_e),
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(top_k + 1),
    )
    _add_chunks[(calls,)](
        parts_i,
        parts_f,
        ints,
        floats,
        chunks,
        *sizes,
        BLOCK_E=block_e,
        BLOCK_I=triton.next_power_of_2(columns),
        SUMS=_SUMS,
    )
    return PackedStats(ints, floats)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in tensors]


def _to_device(rows: list[list[int]], device: torch.device) -> Tensor:
    """A copy from pinned memory, which the host does not wait for."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


@triton.jit
def _sum_chunks(  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    addresses,
    parts_i,
    parts_f,
    calls,
    tokens,
    num_experts,
    classes,
    top_k,
    chunk_tokens,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    LOGIT: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    chunk, call = tl.program_id(0), tl.program_id(1)
    weights = tl.load(addresses + call).to(tl.pointer_type(WEIGHT))
    index = tl.load(addresses + calls + call).to(tl.pointer_type(INDEX))
    experts_E = tl.arange(0, BLOCK_E)
    slots_K = tl.arange(0, BLOCK_K)
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    histogram_K = tl.zeros([BLOCK_K], tl.int32)
    padding_T = tl.zeros([BLOCK_T], tl.int32)
    finite_T = tl.zeros([BLOCK_T], tl.int32)
    probs_E = tl.zeros([BLOCK_E], tl.float32)
    entropy_T = tl.zeros([BLOCK_T], tl.float32)
    top1_T = tl.zeros([BLOCK_T], tl.float32)
    mass_T = tl.zeros([BLOCK_T], tl.float32)
    z_T = tl.zeros([BLOCK_T], tl.float32)
    end = tl.minimum((chunk + 1) * chunk_tokens, tokens)
    for start in range(chunk * chunk_tokens, end, BLOCK_T):
        rows_T = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        live_T = rows_T < end
        prob_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        if LOGIT is not None:
            logits = tl.load(addresses + 2 * calls + call).to(tl.pointer_type(LOGIT))
            exists_TE = live_T[:, None] & (experts_E < classes)[None, :]
            logits_TE = tl.load(
                logits + rows_T[:, None] * classes + experts_E[None, :], mask=exists_TE, other=-float("inf")
            ).to(tl.float32)
            max_T = tl.max(logits_TE, 1)
            shifted_TE = logits_TE - max_T[:, None]
            exp_TE = tl.where(exists_TE, tl.exp(shifted_TE), 0.0)
            sum_T = tl.sum(exp_TE, 1)
            logsumexp_T = max_T + tl.log(sum_T)
            good_T = live_T & (logsumexp_T - logsumexp_T == 0.0)  # neither NaN nor infinite
            prob_TE = tl.where(good_T[:, None], exp_TE / sum_T[:, None], 0.0)
            # ln S - sum p (x - m): two terms of one sign, so that nothing cancels.
            weighted_TE = tl.where(prob_TE > 0.0, prob_TE * shifted_TE, 0.0)
            entropy_T += tl.where(good_T, tl.log(sum_T), 0.0) - tl.sum(weighted_TE, 1)
            top1_T += tl.where(good_T, 1.0 / sum_T, 0.0)
            z_T += tl.where(good_T, logsumexp_T * logsumexp_T, 0.0)
            probs_E += tl.sum(prob_TE, 0)
            finite_T += good_T.to(tl.int32)
        used_T = tl.zeros([BLOCK_T], tl.int32)
        for k in range(top_k):
            raw_T = tl.load(index + rows_T * top_k + k, mask=live_T, other=0)
            weight_T = tl.load(weights + rows_T * top_k + k, mask=live_T, other=0.0)
            outside_T = (raw_T < 0) | (raw_T >= num_experts)
            id_T = tl.where(outside_T, num_experts + 1, tl.where(weight_T == 0.0, num_experts, raw_T))
            id_T = tl.where(live_T, id_T, -1).to(tl.int32)
            counts_E += tl.sum((id_T[:, None] == experts_E[None, :]).to(tl.int32), 0)
            is_used_T = live_T & (id_T < num_experts)
            used_T += is_used_T.to(tl.int32)
            class_T = tl.minimum(id_T, classes - 1)
            chosen_TE = is_used_T[:, None] & (class_T[:, None] == experts_E[None, :])
            mass_T += tl.sum(tl.where(chosen_TE, prob_TE, 0.0), 1)
        is_count_TK = live_T[:, None] & (used_T[:, None] == slots_K[None, :])
        histogram_K += tl.sum(is_count_TK.to(tl.int32), 0)
        if PADDING:
            mask = tl.load(addresses + 3 * calls + call).to(tl.pointer_type(tl.int8))
            is_padding_T = tl.load(mask + rows_T, mask=live_T, other=0) != 0
            padding_T += tl.where(is_padding_T, used_T, 0)
    row = call * tl.num_programs(0) + chunk
    out_i = parts_i + row * (num_experts + top_k + 5)
    tl.store(out_i + experts_E, counts_E, mask=experts_E < num_experts + 2)
    tl.store(out_i + num_experts + 2 + slots_K, histogram_K, mask=slots_K <= top_k)
    tl.store(out_i + num_experts + top_k + 3, tl.sum(padding_T, 0))
    tl.store(out_i + num_experts + top_k + 4, tl.sum(finite_T, 0))
    out_f = parts_f + row * (4 + classes)
    tl.store(out_f, tl.sum(entropy_T, 0))
    tl.store(out_f + 1, tl.sum(top1_T, 0))
    tl.store(out_f + 2, tl.sum(mass_T, 0))
    tl.store(out_f + 3, tl.sum(z_T, 0))
    tl.store(out_f + 4 + experts_E, probs_E, mask=experts_E < classes)


@triton.jit
def _add_chunks(  # type: ignore[no-untyped-def]
    parts_i,
    parts_f,
    ints,
    floats,
    chunks,
    tokens,
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
