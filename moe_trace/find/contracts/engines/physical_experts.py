"""Experts and the slots that hold them: under a load balancer (EPLB), hot experts have replicas.

A router chooses among E experts; the kernel is handed ids of P >= E slots. vLLM keeps the map from experts to
slots on the device and writes it anew, in place, between two forwards; so ids are taken back to experts, and
the map is kept, while their forward ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_trace.find.contracts.overhead_range import overhead_range


def experts_of_slots(slots_ER: Tensor, num_slots: int) -> Tensor:
    """[P + 1] the expert that each slot holds, -1 for none; the last is of ids that are no slot.

    Nothing waits for the device, here and below.

    Args:
        slots_ER: [E, R] integers, the slots that hold a copy of each expert, -1 where there are fewer than R:
            vLLM's `EplbLayerState.logical_to_physical_map`.
        num_slots: P.
    """
    with overhead_range():
        # Each expert has a slot, so none has more than these; vLLM's map has room for 1,024.
        slots_ER = slots_ER[:, : num_slots - slots_ER.shape[0] + 1]
        experts_E = torch.arange(slots_ER.shape[0], device=slots_ER.device)
        # One place more than slots: what is none is written to, and read from, the last.
        expert_P1 = torch.full((num_slots + 1,), -1, dtype=torch.int64, device=slots_ER.device)
        expert_P1.scatter_(
            0, _or_last(slots_ER, num_slots).flatten(), experts_E.repeat_interleave(slots_ER.shape[1])
        )
        expert_P1[-1:] = -1
        return expert_P1


def logical_ids(ids_TK: Tensor, expert_P1: Tensor) -> Tensor:
    """[T, K] expert of each slot id; ids of no slot in use become -1."""
    with overhead_range():
        return expert_P1[_or_last(ids_TK, len(expert_P1) - 1)]


def slots_of_call(ids_TK: Tensor, weights_TK: Tensor, expert_P1: Tensor) -> Tensor:
    """`RouterOutput.slots_2P` of a call; slots of weight 0 and ids of no slot in use count nowhere.

    Args:
        weights_TK: what scales each id's output.
    """
    with overhead_range():
        ids_N = _or_last(ids_TK.masked_fill(weights_TK == 0, -1), len(expert_P1) - 1).flatten()
        counted_N = (expert_P1[ids_N] >= 0).long()
        counts_P1 = torch.zeros_like(expert_P1).scatter_add_(0, ids_N, counted_N)
        return torch.cat([counts_P1[:-1], expert_P1[:-1]])


def _or_last(ids: Tensor, num_slots: int) -> Tensor:
    ids = ids.long()
    return torch.where((ids >= 0) & (ids < num_slots), ids, num_slots)
