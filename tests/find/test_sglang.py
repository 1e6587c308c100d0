"""Tests of a stand-in with the interface of SGLang's `TopK`. SGLang itself does not install on a CPU.

Names, arguments and forms of outputs are those of `layers/moe/topk.py`, `models/qwen3_moe.py` and
`models/deepseek_v2.py`; the classes' bodies are ours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import moe_trace

DIM, EXPERTS, TOP_K, TOKENS = 16, 6, 2, 9


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class BypassedTopKOutput(NamedTuple):
    hidden_states: Tensor
    router_logits: Tensor
    topk_config: Any
    num_token_non_padded: Tensor | None = None
    expert_location_dispatch_info: Any = None


@dataclass
class TopKConfig:
    top_k: int
    num_fused_shared_experts: int = 0
    correction_bias: Tensor | None = None
    bypassed: bool = False


class TopK(nn.Module):
    """Sigmoid scores with a bias in the choice; fused shared experts are appended, padding is -1."""

    def __init__(self, top_k: int, *, fused: int = 0, bias: Tensor | None = None) -> None:
        super().__init__()
        self.topk_config = TopKConfig(top_k + fused, fused, bias)
        self.to_physical: Tensor | None = None
        self.chosen: list[Tensor] = []

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        *,
        num_token_non_padded: Tensor | None = None,
        expert_location_dispatch_info: Any = None,
    ) -> Any:
        config, fused = self.topk_config, self.topk_config.num_fused_shared_experts
        if config.bypassed:
            return BypassedTopKOutput(hidden_states, router_logits, config)
        scores = router_logits.sigmoid()
        choice = scores if config.correction_bias is None else scores + config.correction_bias
        ids = choice.topk(config.top_k - fused, dim=-1).indices
        weights = scores.gather(1, ids)
        ids = ids if self.to_physical is None else self.to_physical[ids]
        if num_token_non_padded is not None:
            ids[num_token_non_padded:] = -1
        self.chosen.append(ids.clone())
        shared = torch.full((len(ids), fused), router_logits.shape[1])
        return StandardTopKOutput(
            torch.cat([weights, torch.ones(len(ids), fused)], 1),
            torch.cat([ids, shared], 1).to(torch.int32),
            router_logits,
        )


class ReplicatedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return linear(x, self.weight), None


class FusedMoE(nn.Module):
    def __init__(self, num_experts: int, held: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w13_weight = nn.Parameter(torch.randn(held, 2 * DIM, DIM))
        self.w2_weight = nn.Parameter(torch.randn(held, DIM, DIM))

    def forward(self, hidden_states: Tensor, topk_output: Any) -> Tensor:
        return hidden_states * 2


class Block(nn.Module):
    """As Qwen3-MoE's and DeepSeek-V3's: gate, topk, experts, each called or only used."""

    def __init__(self, *, fused: int = 0, redundant: int = 0, calls_gate: bool = True, **topk: Any) -> None:
        super().__init__()
        self.gate = ReplicatedLinear()
        self.topk = TopK(TOP_K, fused=fused, **topk)
        num_experts = EXPERTS + fused + redundant
        self.experts = FusedMoE(num_experts, num_experts)
        self.calls_gate, self.padding = calls_gate, None
        self.by_name = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = self.gate(hidden_states)[0] if self.calls_gate else linear(hidden_states, self.gate.weight)
        chosen = self.topk(hidden_states, logits, num_token_non_padded=self.padding)
        if self.by_name:
            return self.experts(hidden_states=hidden_states, topk_output=chosen)
        return self.experts(hidden_states, chosen)


def recorded(block: Block, forwards: int = 5) -> moe_trace.Recording:
    model = nn.Sequential(block)
    with torch.no_grad(), warnings.catch_warnings(), moe_trace.MoETracer(model) as tracer:
        warnings.simplefilter("ignore")
        for _ in range(forwards):
            model(torch.randn(TOKENS, DIM))
    return tracer.recording()


def counts(block: Block, experts: int = EXPERTS) -> list[list[int]]:
    return [torch.bincount(ids[ids >= 0], minlength=experts).tolist() for ids in block.topk.chosen]


@pytest.mark.parametrize("calls_gate", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_counts_are_what_topk_chose(calls_gate: bool, by_name: bool) -> None:
    block = Block(calls_gate=calls_gate, bias=torch.tensor([9.0, 0, 0, 0, 0, 0]))
    block.by_name = by_name
    recording = recorded(block)
    assert [list(map(int, sample.assignments)) for sample in recording.samples] == counts(block)
    assert all(sample.assignments[0] == TOKENS for sample in recording.samples), "the bias chose expert 0"
    assert not recording.lost.calls and all(sample.router_entropy is not None for sample in recording.samples)


def test_the_router_is_described_with_the_gates_weights() -> None:
    site = moe_trace.find_routers(nn.Sequential(Block(fused=1)))[0]
    assert (site.info.contract, site.name, site.info.num_experts, site.info.top_k) == (
        "sglang-topk",
        "0.topk",
        EXPERTS,
        TOP_K,
    )
    assert site.info.router_flops_per_token == 2 * EXPERTS * DIM
    assert site.info.expert_flops_per_slot == 2 * 3 * DIM * DIM
    assert len(site.info.notes) == 1 and "shared experts are fused" in site.info.notes[0]


def test_fused_shared_experts_and_padding_are_not_counted() -> None:
    block = Block(fused=1)
    block.padding = 4
    recording = recorded(block)
    assert [list(map(int, s.assignments)) for s in recording.samples] == counts(block)
    assert {sum(map(int, s.assignments)) for s in recording.samples} == {4 * TOP_K}
    assert not recording.lost.calls


def test_physical_slots_are_counted_as_slots_and_said_to_be() -> None:
    block = Block(redundant=2)
    block.topk.to_physical = torch.tensor([7, 1, 2, 3, 4, 6])
    recording = recorded(block)
    assert [list(map(int, s.assignments)) for s in recording.samples] == counts(block, EXPERTS + 2)
    assert {s.router_entropy for s in recording.samples} == {None}
    assert "physical slots" in " ".join(recording.routers[0].notes)


@pytest.mark.parametrize("form", ["bypassed", "interleaved", "columns"])
def test_what_tells_no_decision_is_lost_with_a_reason(form: str) -> None:
    block = Block(fused=1 if form == "interleaved" else 0, redundant=3 if form == "interleaved" else 0)
    block.topk.topk_config.bypassed = form == "bypassed"
    if form == "columns":  # as DeepEP's waterfill, which appends a column behind `top_k`
        block.topk.register_forward_hook(
            lambda module, args, out: StandardTopKOutput(
                *(torch.cat([part, part[:, :1]], 1) for part in out[:2]), out.router_logits
            )
        )
    recording = recorded(block, 2)
    assert not recording.samples and recording.lost.calls
    assert list(recording.lost.misread)


def test_the_trace_places_every_call(tmp_path: Path) -> None:
    block = Block()
    model = nn.Sequential(block)
    with moe_trace.profile(model) as profiler, torch.no_grad():
        for _ in range(3):
            model(torch.randn(TOKENS, DIM))
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    read = moe_trace.read_recording(tmp_path / "trace.json")
    assert len(read.samples) == 3 and not read.lost.calls and not read.lost.without_range
