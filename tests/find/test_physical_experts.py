"""Tests that slots are mapped back to the experts that they hold, as in vLLM's EPLB; not run on EPLB."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_trace.find.contracts.engines.physical_experts import experts_of_slots, logical_ids


def experts_to_slots(expert_P: list[int], experts: int, width: int) -> Tensor:
    """[E, R] as `compute_logical_maps` of vLLM makes it: the slots of each expert in order, then -1."""
    slots = [[slot for slot, expert in enumerate(expert_P) if expert == e] for e in range(experts)]
    return torch.tensor([row + [-1] * (width - len(row)) for row in slots])


def test_the_example_of_vllm() -> None:
    """The second layer in the docstring of `EplbModelState`."""
    slots = torch.tensor([[0, 2, 4], [3, -1, -1], [1, -1, -1], [5, -1, -1]])
    ids = torch.tensor([[0, 1], [4, 5], [2, 3]], dtype=torch.int32)
    assert logical_ids(ids, experts_of_slots(slots, 6)).tolist() == [[0, 2], [0, 3], [0, 1]]


@given(st.data())
@settings(deadline=None)
def test_every_slot_has_its_expert_and_counts_of_replicas_add_up(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    redundant = data.draw(st.integers(0, 5))
    held = list(range(experts)) + data.draw(
        st.lists(st.integers(0, experts - 1), min_size=redundant, max_size=redundant)
    )
    expert_P = data.draw(st.permutations(held))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(-1, len(expert_P)), min_size=1, max_size=20)), dtype=torch.int32
    )
    slots = experts_to_slots(expert_P, experts, redundant + data.draw(st.integers(1, 3)))
    found = logical_ids(ids.unsqueeze(-1), experts_of_slots(slots, len(expert_P)))
    expected = [expert_P[i] if 0 <= i < len(expert_P) else -1 for i in ids.tolist()]
    assert found.squeeze(-1).tolist() == expected


def test_slots_that_are_out_of_use_are_no_experts() -> None:
    """Elastic expert parallelism keeps room for slots that nobody holds."""
    assert logical_ids(
        torch.tensor([[0, 3]]), experts_of_slots(torch.tensor([[0, -1], [1, -1]]), 4)
    ).tolist() == [[0, -1]]


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode() as mode:
        ids, slots = (
            mode.from_tensor(torch.zeros(5, 2, dtype=torch.int32)),
            mode.from_tensor(torch.zeros(4, 2).long()),
        )
        assert logical_ids(ids, experts_of_slots(slots, 6)).shape == (5, 2)


@pytest.mark.cuda
def test_nothing_waits_for_a_gpu() -> None:
    slots, ids = torch.tensor([[0, 2], [1, -1]]).cuda(), torch.tensor([[2, 1]]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = logical_ids(ids, experts_of_slots(slots, 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == [[0, 1]]
