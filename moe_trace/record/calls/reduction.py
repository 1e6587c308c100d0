"""From the tensors of many router calls to two small ones, by the fastest way that their device has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_trace.record.calls.batch import Batch
from moe_trace.record.calls.call import PendingCall
from moe_trace.record.parallel.dispatch import append_sent_counts
from moe_trace.record.reduce.kernels import FUSED
from moe_trace.record.reduce.stats import PackedStats, routing_stats
from moe_trace.record.reduce.streams import on_device

# Logits of one batch. On a device this bounds the scratch memory to about 3 x 64 MiB; on a CPU a batch that
# fits its cache takes half the time of one that does not.
_REDUCED_ELEMENTS_MAX = {"cpu": 2**17, "cuda": 2**24}


def groups_of_one_shape(pending: Sequence[PendingCall]) -> Iterator[list[PendingCall]]:
    """Calls that one batch of kernels can take: same shapes, types and device."""
    groups: dict[Any, list[PendingCall]] = {}
    for item in pending:
        groups.setdefault(_shape_key(item), []).append(item)
    for group in groups.values():
        logits = group[0].reading.logits_TE
        elements = max(1, (logits if logits is not None else group[0].reading.index_TK).numel())
        elements = max(elements, group[0].record.site.info.num_experts)  # the width of what it is reduced to
        limit = _REDUCED_ELEMENTS_MAX.get(group[0].reading.index_TK.device.type, 2**24)
        size = max(1, limit // elements)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _shape_key(item: PendingCall) -> Any:
    reading = item.reading
    index, weights, logits = reading.index_TK, reading.weights_TK, reading.logits_TE
    return (
        item.stream,
        index.shape,
        index.device,
        index.dtype,
        weights.dtype,
        None if logits is None else (logits.shape, logits.dtype),
        item.record.site.info.num_experts,
        item.record.padding_T is None,
        item.record.sending,
    )


def reduce_group(group: list[PendingCall]) -> Batch:
    """Reduce calls of one shape, on the device and the stream that made them; nothing waits."""
    first = group[0]
    logits = first.reading.logits_TE
    tokens, top_k = first.reading.index_TK.shape
    num_experts = first.record.site.info.num_experts or (logits.shape[-1] if logits is not None else 0)
    stats = _fused(group, num_experts)
    if stats is None:
        stats = _by_operators(group, num_experts)
    for item in group:
        item.record.padding_T = None
    return Batch(
        records=[p.record for p in group],
        top_k=top_k,
        tokens=tokens,
        num_experts=num_experts,
        classes=0 if logits is None else logits.shape[-1],
        ints=append_sent_counts(
            stats.ints, first.record.sending, [p.reading.index_TK for p in group], num_experts
        ),
        floats=stats.floats,
        stream=first.stream,
    )


def _by_operators(group: list[PendingCall], num_experts: int) -> PackedStats:
    """With torch's own operators: on any device, for any type."""
    first = group[0]
    logits, padding = first.reading.logits_TE, first.record.padding_T
    return routing_stats(
        None if logits is None else _stack([p.reading.logits_TE for p in group]),
        _stack([p.reading.weights_TK for p in group]),
        _stack([p.reading.index_TK for p in group]),
        num_experts,
        None if padding is None else _stack(_masks(group)),
    )


def _fused(group: list[PendingCall], num_experts: int) -> PackedStats | None:
    """With the fused kernels; None where they are not ready, or cannot be used."""
    reading = group[0].reading
    fused = FUSED.ready_for(reading, num_experts)
    if fused is None:
        return None
    device = reading.index_TK.device
    try:
        with on_device(device):
            stats: PackedStats = fused.fused_routing_stats(
                None if reading.logits_TE is None else [_of(p.reading.logits_TE) for p in group],
                [p.reading.weights_TK for p in group],
                [p.reading.index_TK for p in group],
                num_experts,
                None if group[0].record.padding_T is None else _masks(group),
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        FUSED.failed(device, error)
        return None
    return stats


def _masks(group: list[PendingCall]) -> list[Tensor]:
    """The mask stands where the model's input is; with a device map its later layers are elsewhere."""
    device = group[0].reading.index_TK.device
    return [_of(p.record.padding_T).to(device, non_blocking=True) for p in group]


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # a group has one shape: all of its calls have it, or none
    return tensor


def _stack(tensors: list[Any]) -> Tensor:
    return tensors[0].detach().unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
