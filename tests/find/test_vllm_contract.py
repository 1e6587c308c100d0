"""Tests of a stand-in with the structure of vLLM's runner, since vLLM has a separate environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_trace
from moe_trace.data.errors import MoETraceError
from moe_trace.find.contracts.engines.vllm import Tap, remove_taps


class Choice:
    """A router that is no module; ids are int32, as vLLM's kernels want them."""

    def select_experts(
        self, hidden_states: Tensor, router_logits: Tensor, topk_indices_dtype: Any = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.softmax(-1).topk(2, dim=-1)
        return weights, ids.to(torch.int32)


class RoutedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.randn(6, 16, 8))
        self.seen: list[Tensor] = []

    def forward_modular(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Any = None
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.append(topk_ids.clone())
        return x * topk_weights.sum(-1, keepdim=True)

    def forward_monolithic(self, x: Tensor, router_logits: Tensor) -> Tensor:
        return x


class Runner(nn.Module):
    def __init__(self, router: Any = None, *, monolithic: bool = False) -> None:
        super().__init__()
        self.router, self.routed_experts = router or Choice(), RoutedExperts()
        self.moe_config = SimpleNamespace(num_experts=6, experts_per_token=2)
        self.is_monolithic = monolithic

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        if self.is_monolithic:
            return self.routed_experts.forward_monolithic(x=hidden_states, router_logits=router_logits)
        weights, ids = self.router.select_experts(hidden_states=hidden_states, router_logits=router_logits)
        return self.routed_experts.forward_modular(x=hidden_states, topk_weights=weights, topk_ids=ids)


class Block(nn.Module):
    def __init__(self, **runner: Any) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 6, bias=False), Runner(**runner)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(hidden_states=x, router_logits=self.gate(x))


def model_of(**runner: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(**runner), Block(**runner)).eval()


def counts_of(ids: Tensor) -> list[int]:
    return torch.bincount(ids.flatten().long(), minlength=6).tolist()


def test_what_the_experts_received_is_counted_and_nothing_stays() -> None:
    model, x = model_of(), torch.randn(5, 8)
    state, modules = list(model.state_dict()), list(model.modules())
    before = model(x)
    with moe_trace.MoETracer(model) as tracer:
        assert torch.equal(model(x), before)
        for _ in range(40):  # enough for them to be taken apart in columns
            model(torch.randn(5, 8))
    assert [site.name for site in tracer.sites] == ["0.gate", "1.gate"]
    assert [(s.info.num_experts, s.info.router_class) for s in tracer.sites] == [(6, "Choice")] * 2
    assert list(model.state_dict()) == state and list(model.modules()) == modules
    for block, name in zip(model, ("0.gate", "1.gate"), strict=True):
        found = [s.assignments.tolist() for s in tracer.samples() if s.name == name]
        assert found == [counts_of(ids) for ids in block.experts.routed_experts.seen[1:]]
    assert all(s.router_entropy is not None for s in tracer.samples())
    remove_taps(model)
    assert not [m for b in model for m in vars(b.experts.router).values() if isinstance(m, Tap)]
    assert "forward_modular" not in vars(model[0].experts.routed_experts)
    assert torch.equal(model(x), before)


def test_int32_ids_are_counted_in_compiled_code() -> None:
    torch.compiler.reset()
    model = model_of()
    expected = []
    with moe_trace.MoETracer(model) as tracer:
        compiled = torch.compile(model, backend="aot_eager")
        for tokens in (5, 700):  # kept as they are, and reduced inside the graph
            x = torch.randn(tokens, 8)
            logits = model[0].gate(x)
            expected.append(counts_of(logits.softmax(-1).topk(2, dim=-1).indices))
            compiled(x)
        samples = tracer.samples()
    assert [s.assignments.tolist() for s in samples if s.name == "0.gate"] == expected
    torch.compiler.reset()


def test_a_monolithic_kernel_is_counted_as_lost_with_its_reason() -> None:
    model = model_of(monolithic=True)
    with pytest.warns(RuntimeWarning, match="monolithic kernel"), moe_trace.MoETracer(model) as tracer:
        model(torch.randn(3, 8))
    assert tracer.samples() == []
    lost = tracer.recording().lost
    assert sum(sum(one.values()) for one in lost.calls.values()) == 2


def test_another_signature_is_named() -> None:
    class Other:
        def select_experts(self, hidden_states: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError

    with pytest.raises(MoETraceError, match=r"to take router_logits; it takes hidden_states, scores"):
        moe_trace.MoETracer(model_of(router=Other()))
