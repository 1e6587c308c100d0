"""Tests of contracts: fused blocks, unknown families, and what an adapter's `read` must not do."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.functional import linear

import moe_trace
from families.configs import BY_NAME
from families.family import Family
from moe_trace.data.errors import NoRoutersFound
from moe_trace.find.contracts import Call, RouterOutput

torch.set_num_threads(1)

MIXTRAL = BY_NAME["mixtral/text"]
GPT_OSS = BY_NAME["gpt_oss/text"]


# --- fused blocks ---


class FusedBlock(nn.Module):
    """The shape of transformers' MXFP4 block: it uses the weights of its parts and calls neither."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.experts = block.router, block.experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = linear(flat, self.router.weight, self.router.bias)
        top, index = logits.topk(self.router.top_k, dim=-1)
        output = self.experts.forward(flat, index, top.softmax(-1))
        return output.reshape(hidden_states.shape), logits


def test_fused_blocks_are_read_from_their_input(tmp_path: Path) -> None:
    plain = GPT_OSS.build()
    with moe_trace.MoETracer(plain) as usual:
        expected_logits = GPT_OSS.run(plain).logits
    fused: Any = GPT_OSS.build()
    for layer in fused.model.layers:
        layer.mlp = FusedBlock(layer.mlp)
    trace = tmp_path / "trace.json"
    with moe_trace.profile(fused) as prof:
        logits = GPT_OSS.run(fused).logits
    prof.export_chrome_trace(str(trace))
    torch.testing.assert_close(logits, expected_logits)
    samples = prof.tracer.samples()
    assert len(samples) == len(usual.samples()) == 3
    for sample, expected in zip(samples, usual.samples(), strict=True):
        assert (sample.name, sample.assignments.tolist()) == (expected.name, expected.assignments.tolist())
        assert sample.expert_flops == expected.expert_flops
        assert sample.router_entropy == pytest.approx(expected.router_entropy, rel=1e-6)
        assert sample.placement is not None
        assert set(sample.placement.host) == {"block"}
    summary = moe_trace.read_summary(trace)
    assert summary.lost.samples_without_range == 0
    assert summary.routers[0].latency.host is None, "the time of the block is not the router's"
    assert any("its block ran fused" in note for note in summary.notes)


def test_a_block_that_is_called_again_normally_is_no_fused_call() -> None:
    model = GPT_OSS.build()
    with moe_trace.MoETracer(model) as tracer:
        GPT_OSS.run(model)
        GPT_OSS.run(model)
    assert len(tracer.samples()) == 6
    assert not any("fused" in note for note in tracer.summary().notes)


def test_other_fused_blocks_are_reported_as_never_called() -> None:
    model: Any = MIXTRAL.build()
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden: hidden
    with moe_trace.MoETracer(model) as tracer:
        MIXTRAL.run(model)
    assert tracer.samples() == []
    assert len(tracer.recording().lost.never_called) == 3
    assert any("never called" in note and "fused kernel" in note for note in tracer.summary().notes)


# --- families of tomorrow ---


class Experts(nn.Module):
    """Three-dimensional weights, one matrix each."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width, width))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = self.weight[top_k_index]
        return torch.einsum("th,tkho,tk->to", hidden_states, chosen, top_k_weights)


class TomorrowRouter(nn.Module):
    """Returns what the families of today return."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = 3, experts
        self.weight = nn.Parameter(torch.randn(experts, width))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(hidden, self.weight)
        weights, index = logits.softmax(-1).topk(self.top_k)
        return logits, weights, index


class TomorrowBlock(nn.Module):
    def __init__(self, router_name: str) -> None:
        super().__init__()
        self.router_name = router_name
        self.add_module(router_name, TomorrowRouter(6, 8))
        self.bank = Experts(6, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        _, weights, index = self.get_submodule(self.router_name)(hidden)
        return self.bank(hidden, index, weights)


@pytest.mark.parametrize("router_name", ["gate", "router", "chooser"])
def test_a_new_family_with_the_usual_contract_needs_nothing(router_name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), TomorrowBlock(router_name), TomorrowBlock(router_name))
    hidden = torch.randn(5, 8)
    seen: list[list[int]] = []
    for block in (model[1], model[2]):
        hook = lambda m, args: seen.append(torch.bincount(args[1].flatten(), minlength=6).tolist())  # noqa: E731
        block.get_submodule("bank").register_forward_pre_hook(hook)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(hidden)
    assert [sample.assignments.tolist() for sample in tracer.samples()] == seen
    assert [sample.name for sample in tracer.samples()] == [f"1.{router_name}", f"2.{router_name}"]
    assert tracer.samples()[0].expert_flops == 2 * 8 * 8 * 5 * 3


class StrangeExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, rows: Tensor, plan: Tensor) -> Tensor:
        return rows


class StrangeBlock(nn.Module):
    """Experts that are told a plan: no contract knows what it means."""

    def __init__(self, gate_name: str) -> None:
        super().__init__()
        self.add_module(gate_name, nn.Linear(8, 4))
        self.gate_name = gate_name
        self.experts = StrangeExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(hidden, self.get_submodule(self.gate_name)(hidden))


LACKS = (
    "0 (StrangeBlock): no module named gate or router has an output for each of its 4 experts beside it "
    "(planner, experts)"
)


def test_an_unknown_contract_is_reported_and_not_guessed_at() -> None:
    with pytest.raises(NoRoutersFound) as none:
        moe_trace.find_routers(nn.Sequential(StrangeBlock("planner")))
    message = str(none.value)
    assert f"1 modules look like routed experts and follow none of them: {LACKS}" in message
    assert "moe_trace.register_adapter" in message


def test_an_unknown_contract_beside_known_ones_is_warned_about() -> None:
    model = nn.Sequential(StrangeBlock("planner"), TomorrowBlock("gate"))
    with pytest.warns(RuntimeWarning, match=re.escape(LACKS)):
        sites = moe_trace.find_routers(model)
    assert [site.name for site in sites] == ["1.gate"]


def test_a_gate_whose_experts_are_told_a_plan_is_lost_and_not_guessed_at() -> None:
    model = nn.Sequential(StrangeBlock("gate"))
    with moe_trace.MoETracer(model) as tracer, pytest.warns(RuntimeWarning, match="found float32 tensor of"):
        model(torch.randn(5, 8))
        assert tracer.samples() == []
    assert [sum(reasons.values()) for reasons in tracer.recording().lost.calls.values()] == [1]


class MaskRouter(TomorrowRouter):
    """Hands on a mask over all experts under the name of an index."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, index = super().forward(hidden)
        mask = torch.zeros_like(logits, dtype=torch.int64).scatter_(1, index, 1)
        return mask, logits.softmax(-1), logits


class MaskBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = MaskRouter(6, 8), Experts(6, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        mask, weights, _ = self.gate(hidden)
        return self.experts(hidden, mask, weights)


def test_a_mask_under_the_name_of_an_index_is_not_counted() -> None:
    model = nn.Sequential(MaskBlock())
    tracer = moe_trace.MoETracer(model)
    with tracer, pytest.warns(RuntimeWarning, match="expected logits to be floating-point numbers"):
        model(torch.randn(5, 8))
    assert tracer.samples() == []
    assert list(tracer.recording().lost.misread) == ["0.gate"]


def test_nothing_warns_about_a_model_that_is_understood() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe_trace.find_routers(BY_NAME["inkling/text"].build())  # its shared experts are 3-D weights too


# --- reading must not wait for the device ---


@pytest.mark.parametrize(
    "name",
    [
        "mixtral/text",
        "gemma4/text",
        "deepseek_v4/text",
        "zaya/text",
        "longcat_flash/text",
        "dbrx/text",
        "switch_transformers/dropping",
        "nllb_moe/seq2seq",
        "llama4/text",
        "jetmoe/text",
        "doge/text",
    ],
)
def test_reading_depends_on_no_value(name: str) -> None:
    """Fake tensors have no values: whatever waits for one (`item`, `nonzero`, …) raises on them."""
    family = BY_NAME[name]
    model = family.build()
    calls = calls_of(model, family)
    assert calls
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for site, call, expected in calls:
            reading = site.read(as_fake(mode, call))
            assert reading.index_TK.shape == expected.index_TK.shape
            assert isinstance(reading.index_TK, FakeTensor)


def test_fake_tensors_notice_waiting() -> None:
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        mode.from_tensor(torch.ones(2)).sum().item()
    with FakeTensorMode() as mode, pytest.raises(DynamicOutputShapeException):
        mode.from_tensor(torch.ones(2)).nonzero()


def calls_of(model: nn.Module, family: Family) -> list[tuple[moe_trace.RouterSite, Call, RouterOutput]]:
    """What the hooks of each router see in one forward, and what is read from it."""
    tracer = moe_trace.MoETracer(model)
    seen: list[tuple[moe_trace.RouterSite, Call, RouterOutput]] = []
    for hooks in tracer._hooks.routers:

        def keep(call: Call, site: moe_trace.RouterSite = hooks.site) -> RouterOutput:
            seen.append((site, call, site.read(call)))
            return seen[-1][2]

        hooks.read = keep
    with tracer:
        family.run(model)
    return seen


def as_fake(mode: FakeTensorMode, value: Any) -> Any:
    """The same call with tensors that have shapes only."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value.detach())
    if isinstance(value, tuple | list):
        return type(value)(as_fake(mode, item) for item in value)
    if isinstance(value, Call):
        return Call(
            router_output=as_fake(mode, value.router_output),
            experts_args=as_fake(mode, value.experts_args),
            watched_output=as_fake(mode, value.watched_output),
        )
    return value
