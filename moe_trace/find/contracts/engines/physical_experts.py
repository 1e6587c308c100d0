"""Mapping between experts and physical slots under an expert parallel load balancer (EPLB) with replicas.

A router chooses among E experts; the kernel receives ids of P >= E slots. vLLM keeps the map from experts to
slots on the device and overwrites it between forwards; so ids are mapped back to experts, and the map is
saved, when their forward ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_trace.find.contracts.overhead_range import overhead_range


def experts_of_slots(slots_ER: Tensor, num_slots: int) -> Tensor:
    """Return the expert of each slot, [P + 1], -1 for none; the last element is for ids that are no slot.

    The functions of this module do not synchronize with the device.

    Args:
        slots_ER: [E, R] integers, the slots that hold a copy of each expert, padded with -1: vLLM's
            `EplbLayerState.logical_to_physical_map`.
        num_slots: P.
    """
    with overhead_range():
        # Each expert has a slot, so none has more than P - E + 1; vLLM's map has room for 1,024.
        slots_ER = slots_ER[:, : num_slots - slots_ER.shape[0] + 1]
        experts_E = torch.arange(slots_ER.shape[0], device=slots_ER.device)
        # The extra last element is written and read for ids that are no slot.
        expert_P1 = torch.full((num_slots + 1,), -1, dtype=torch.int64, device=slots_ER.device)
        expert_P1.scatter_(
            0, _replace_invalid(slots_ER, num_slots).flatten(), experts_E.repeat_interleave(slots_ER.shape[1])
        )
        expert_P1[-1:] = -1
        return expert_P1


def logical_ids(ids_TK: Tensor, expert_P1: Tensor) -> Tensor:
    """Return the expert of each slot id, [T, K]; -1 for ids that are no slot in use."""
    with overhead_range():
        return expert_P1[_replace_invalid(ids_TK, len(expert_P1) - 1)]


def slots_of_call(ids_TK: Tensor, weights_TK: Tensor, expert_P1: Tensor) -> Tensor:
    """Return `RouterOutput.slots_2P` of a call, without ids of weight 0 and ids that are no slot in use.

    Args:
        weights_TK: gating weight of each id.
    """
    with overhead_range():
        ids_N = _replace_invalid(ids_TK.masked_fill(weights_TK == 0, -1), len(expert_P1) - 1).flatten()
        counted_N = (expert_P1[ids_N] >= 0).long()
        counts_P1 = torch.zeros_like(expert_P1).scatter_add_(0, ids_N, counted_N)
        return torch.cat([counts_P1[:-1], expert_P1[:-1]])


def _replace_invalid(ids: Tensor, num_slots: int) -> Tensor:
    ids = ids.long()
    return torch.where((ids >= 0) & (ids < num_slots), ids, num_slots)
