"""Tests of parts of vLLM's load balancer (EPLB) on a CPU: router, layer state, policy, and commit of maps.

Its engine starts EPLB only on GPUs ("Expert parallelism load balancing is only supported on CUDA devices or
ROCm devices or XPU devices now"), and experts are mapped to slots by a Triton kernel, which vLLM replaces
by the identity without a GPU. If Triton is installed, these tests run the kernel in Triton's interpreter,
otherwise a transcription of it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_trace

EXPERTS, SLOTS, RANKS, TOP_K, DIM, WIDTH = 16, 20, 4, 4, 8, 1024
"""`WIDTH`: columns that vLLM gives its map of slots by expert."""
Mapping = Callable[..., Tensor]


def transcribed(
    topk_ids: Tensor,
    expert_load_view: Tensor,
    logical_to_physical_map: Tensor,
    logical_replica_count: Tensor,
    record_enabled: Tensor,
    num_unpadded_tokens: Tensor | None = None,
) -> Tensor:
    """`_eplb_map_and_record_i32_kernel`, element by element."""
    found = torch.empty_like(topk_ids)
    real = len(topk_ids) if num_unpadded_tokens is None else int(num_unpadded_tokens)
    for token, row in enumerate(topk_ids.tolist()):
        for place, expert in enumerate(row):
            copies = max(1, int(logical_replica_count[expert]))
            slot = int(logical_to_physical_map[expert, ((token * 2654435769) & 0xFFFFFFFF) % copies])
            found[token, place] = slot
            if bool(record_enabled) and token < real and 0 <= slot < len(expert_load_view):
                expert_load_view[slot] += 1
    return found


def vllms_kernel(folder: Path) -> Mapping:
    """The functions of vLLM's file that it defines on GPUs only, as a module of their own."""
    from vllm.model_executor.layers.fused_moe.router import base_router

    source = Path(str(base_router.__file__)).read_text()
    branch = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    parts = [ast.unparse(node) for node in branch.body]
    file = folder / "vllms_kernel.py"
    file.write_text("\n\n".join(["import torch, triton\nimport triton.language as tl", *parts]))
    spec = importlib.util.spec_from_file_location("vllms_kernel", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mapping: Mapping = module.eplb_map_to_physical_and_record
    return mapping


@pytest.fixture(params=["transcribed", "kernel"])
def mapping(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Mapping]:
    from vllm.model_executor.layers.fused_moe.router import base_router

    found = transcribed
    if request.param == "kernel":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="vLLM's CPU build does without Triton")
        found = vllms_kernel(tmp_path)
    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", found)
    yield found


class Experts(nn.Module):
    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return x * topk_weights.sum(-1, keepdim=True)


class Layer(nn.Module):
    """What of a runner is asked; router and state are vLLM's own."""

    def __init__(self) -> None:
        from vllm.distributed.eplb.eplb_state import EplbLayerState, compute_logical_maps
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

        super().__init__()
        self.load = torch.zeros(1, SLOTS, dtype=torch.int32)
        first = torch.tensor([[slot % EXPERTS for slot in range(SLOTS)]])
        slots, copies = compute_logical_maps(first, EXPERTS)
        slots = nn.functional.pad(slots, (0, WIDTH - slots.shape[-1]), value=-1)
        self.maps = SimpleNamespace(
            physical_to_logical_map=first, logical_to_physical_map=slots, logical_replica_count=copies
        )
        state = EplbLayerState(
            should_record_tensor=torch.tensor(True), num_unpadded_tokens_tensors=[torch.tensor(0)]
        )
        state.set_layer_state(0, self.load, slots, copies)
        self.router = CPURouter(TOP_K, SLOTS, eplb_state=state)
        self.routed_experts = Experts()
        self.moe_config = SimpleNamespace(
            num_experts=SLOTS, num_logical_experts=EXPERTS, experts_per_token=TOP_K
        )

    @property
    def eplb_state(self) -> Any:
        return self.router.eplb_state

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        self.router.eplb_state.num_unpadded_tokens_tensors[0].fill_(len(x))
        weights, ids = self.router.select_experts(hidden_states=x, router_logits=logits)
        return self.routed_experts.forward_modular(x=x, topk_weights=weights, topk_ids=ids)

    def rebalance(self, load_E: Tensor) -> None:
        from vllm.distributed.eplb.eplb_state import _commit_eplb_maps
        from vllm.distributed.eplb.policy import DefaultEplbPolicy

        moved = DefaultEplbPolicy.rebalance_experts(load_E.unsqueeze(0), SLOTS, 1, 1, RANKS)
        _commit_eplb_maps(self.maps, moved.cpu())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, EXPERTS), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.gate(x))


def test_slots_are_those_of_vllms_buffers_call_by_call(mapping: Mapping) -> None:
    torch.manual_seed(0)
    block: Any = Block().eval()
    model, layer = nn.Sequential(block), block.experts
    loads, maps, logical = [], [], []
    layer.router.set_capture_fn(lambda ids: logical.append(ids.long().flatten().bincount(minlength=EXPERTS)))
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for step in range(12):
            layer.load.zero_()
            model(torch.randn(7 + step, DIM))
            loads.append(layer.load[0].tolist())
            maps.append(layer.maps.physical_to_logical_map[0].tolist())
            if step % 3 == 2:
                layer.rebalance(torch.stack(logical[-3:]).sum(0))
    samples = tracer.samples()
    assert [sample.slot_assignments.tolist() for sample in samples] == loads
    assert [sample.slot_experts.tolist() for sample in samples] == maps and len({*map(tuple, maps)}) > 2
    assert [sample.assignments.tolist() for sample in samples] == [one.tolist() for one in logical]
    assert sum(map(sum, loads)) == TOP_K * sum(range(7, 19))
