"""Experts and the slots that hold them: under a load balancer (EPLB), hot experts have replicas.

A router chooses among E experts; the kernel is handed ids of P >= E slots. vLLM keeps the map from experts to
slots on the device and writes it anew, in place, between two forwards; so ids are taken back to experts while
their forward ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_trace.find.contracts.overhead_range import overhead_range


def logical_ids(ids_TK: Tensor, slots_ER: Tensor, num_slots: int) -> Tensor:
    """[T, K] expert of each slot id; ids of no slot in use become -1. Nothing waits for the device.

    Args:
        ids_TK: integers; ids outside [0, P) are of no slot.
        slots_ER: [E, R] integers, the slots that hold a copy of each expert, -1 where there are fewer than R:
            vLLM's `EplbLayerState.logical_to_physical_map`.
        num_slots: P.
    """
    with overhead_range():
        experts_E = torch.arange(slots_ER.shape[0], device=slots_ER.device)
        # One place more than slots: what is none is written to, and read from, the last.
        expert_P = torch.full((num_slots + 1,), -1, dtype=torch.int64, device=slots_ER.device)
        expert_P.scatter_(
            0, _or_last(slots_ER, num_slots).flatten(), experts_E.repeat_interleave(slots_ER.shape[1])
        )
        expert_P[-1:] = -1
        return expert_P[_or_last(ids_TK, num_slots)]


def _or_last(ids: Tensor, num_slots: int) -> Tensor:
    ids = ids.long()
    return torch.where((ids >= 0) & (ids < num_slots), ids, num_slots)
