"""Reduce the tensors of many router calls to two small ones, by the fastest method for their device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts import RouterOutput
from moe_trace.record.calls.pending import PendingCalls
from moe_trace.record.calls.samples import Batch
from moe_trace.record.parallel.dispatch import append_sent_counts
from moe_trace.record.reduce.kernel_cache import FUSED
from moe_trace.record.reduce.stats import PackedStats, phase_counts, routing_stats
from moe_trace.record.reduce.streams import on_device


def reduce_group(group: PendingCalls) -> Batch:
    """Reduce calls of one form on the device and stream that computed them, without waiting."""
    group.index, group.weights, group.logits = map(_own_part, (group.index, group.weights, group.logits))
    group.masks = _masks(group)
    first = next(iter(group.records))
    has_slots = first.slots_2P is not None
    classes = group.logits[0].shape[-1] if group.logits else 0
    tokens, top_k = group.index[0].shape
    num_experts = first.site.info.num_experts or classes
    stats = _fused(group, num_experts)
    if stats is None:
        logits, masks = (_stack(kind) if kind else None for kind in (group.logits, group.masks))
        stats = routing_stats(logits, _stack(group.weights), _stack(group.index), num_experts, masks)
    ints = append_sent_counts(stats.ints, first.sending, group.index, num_experts)
    return Batch(
        records=group.records,
        top_k=top_k,
        tokens=tokens,
        num_experts=num_experts,
        classes=classes,
        ints=_with_slots(ints, group) if has_slots else ints,
        floats=stats.floats,
        in_phases=_in_phases(group),
        num_slots=first.site.info.num_slots if has_slots else 0,
        stream=group.stream,
    )


def _own_part(tensors: list[Any]) -> list[Tensor]:
    """Return the local tensors of DTensors. Sharded ones raise, because gathering would be a collective."""
    if not tensors or not hasattr(tensors[0], "to_local"):
        return tensors
    if any(not place.is_replicate() for tensor in tensors for place in tensor.placements):
        raise ValueError(
            f"the decision is split over processes (DTensor, {tensors[0].placements}); give the experts "
            "tensors that each process holds whole, such as those of to_local() or full_tensor()"
        )
    return [tensor.to_local() for tensor in tensors]


def _fused(group: PendingCalls, num_experts: int) -> PackedStats | None:
    """Reduce with the fused kernels; return None if they are not ready or cannot be used."""
    index, logits = group.index, group.logits
    fused = FUSED.ready_for(
        RouterOutput(index[0], group.weights[0], logits[0] if logits else None), num_experts
    )
    if fused is None:
        return None
    device = index[0].device
    try:
        with on_device(device):
            stats: PackedStats = fused.fused_routing_stats(
                logits or None, group.weights, index, num_experts, group.masks or None
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        FUSED.failed(device, error)
        return None
    if not _in_phases(group):
        return stats
    kinds = (_stack(index), _stack(group.weights), _stack(group.masks))
    return PackedStats(torch.cat([stats.ints, phase_counts(*kinds, num_experts)], dim=-1), stats.floats)


def _with_slots(ints: Tensor, group: PendingCalls) -> Tensor:
    """Append the `slots_2P` of each call to `ints`, [L, n]."""
    slots = []
    for record in group.records:
        slots.append(record.slots_2P)
        record.slots_2P = None  # the record outlives the reduction
    return torch.cat([ints, torch.stack(slots).to(ints.dtype)], dim=-1)  # type: ignore[arg-type]


def _in_phases(group: PendingCalls) -> bool:
    """Return whether the masks hold token phases rather than only padding."""
    return bool(group.masks) and group.masks[0].dtype == torch.uint8


def _masks(group: PendingCalls) -> list[Tensor]:
    """Return the masks on the device of the index. Masks are on the device of the model's input, from which a
    device map may separate later layers; phases are on the host, and are copied in one piece."""
    device, masks = group.index[0].device, group.masks
    if masks and masks[0].device.type == "cpu" != device.type:
        return list(torch.stack(masks).pin_memory().to(device, non_blocking=True))
    return [mask.to(device, non_blocking=True) for mask in masks]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].detach().unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
