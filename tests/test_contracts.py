"""Routers where a user meets them: inside wrappers, quantised, fused, of a family that nobody has seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.functional import linear
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import moe_trace
from families.configs import BY_NAME
from families.family import Family
from moe_trace.contracts import Call, Reading
from moe_trace.errors import NoRoutersFound

torch.set_num_threads(1)

MIXTRAL = BY_NAME["mixtral/text"]
GPT_OSS = BY_NAME["gpt_oss/text"]


def assignments(model: nn.Module, family: Family) -> list[list[int]]:
    """Of each router call of one forward, in order."""
    with moe_trace.MoETracer(model) as tracer:
        family.run(model)
    return [sample.assignments.tolist() for sample in tracer.samples()]


# --- wrappers ---


class PassesOn(nn.Module):
    """What PEFT and FSDP 1 put round a module: a forward of any arguments, the module under a known name."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner_name = name
        self.add_module(name, inner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self.inner_name)(*args, **kwargs)


def wrap(model: nn.Module, suffix: str, wrapper: Any) -> nn.Module:
    """Put a wrapper round every module whose path ends so."""
    for path in [path for path, _ in model.named_modules() if path.endswith(suffix)]:
        model.set_submodule(path, wrapper(model.get_submodule(path)))
    return model


def check(wrapped: nn.Module, prefix: str = "") -> list[moe_trace.RouterSite]:
    """Same routers, same sizes, same decisions as the bare model; paths lead to the routers."""
    bare = MIXTRAL.build()
    sites, expected = moe_trace.find_routers(wrapped), moe_trace.find_routers(bare)
    assert [site.layer for site in sites] == [0, 1, 2]
    for site, plain in zip(sites, expected, strict=True):
        assert wrapped.get_submodule(site.name) is site.router
        assert site.name.startswith(prefix)
        for figure in ("num_experts", "top_k", "router_class", "experts_class", "expert_flops_per_slot"):
            assert getattr(site.info, figure) == getattr(plain.info, figure)
        assert site.info.router_flops_per_token == plain.info.router_flops_per_token
    assert assignments(wrapped, MIXTRAL) == assignments(bare, MIXTRAL)
    return sites


@pytest.mark.parametrize("name", ["base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("part", ["mlp.experts", "mlp.gate", ".mlp"])
def test_wrapped_parts(part: str, name: str) -> None:
    check(wrap(MIXTRAL.build(), part, lambda module: PassesOn(module, name)))


def test_data_parallel() -> None:
    check(nn.DataParallel(MIXTRAL.build()), "module.model.layers.")


class Adapted(nn.Module):
    """PEFT's shape: the model two levels down, each adapted layer replaced by one that holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        wrap(model, "q_proj", lambda layer: PassesOn(layer, "base_layer"))
        self.base_model = nn.Module()
        self.base_model.add_module("model", model)

    def forward(self, **inputs: Any) -> Any:
        return self.base_model.get_submodule("model")(**inputs)


def test_adapters() -> None:
    check(Adapted(MIXTRAL.build()), "base_model.model.model.layers.")


def test_compiled_models_and_layers() -> None:
    whole: Any = torch.compile(MIXTRAL.build(), backend="eager")
    sites = moe_trace.find_routers(whole)
    assert [site.name for site in sites] == [f"_orig_mod.model.layers.{i}.mlp.gate" for i in range(3)]
    layered = wrap(MIXTRAL.build(), "layers.1", lambda layer: torch.compile(layer, backend="eager"))
    names = [site.name for site in moe_trace.find_routers(layered)]
    assert names[1] == "model.layers.1._orig_mod.mlp.gate"
    assert [site.layer for site in moe_trace.find_routers(layered)] == [0, 1, 2]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = MIXTRAL.build()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check(model)


# --- quantised weights ---


def test_fp8_experts_take_the_place_of_any_experts() -> None:
    """The class swap that transformers does; its forward needs a GPU."""
    plain = MIXTRAL.build()
    model: Any = MIXTRAL.build()
    for layer in model.model.layers:
        layer.mlp.experts = FP8Experts(model.config, block_size=(16, 16))
    for site, bare in zip(moe_trace.find_routers(model), moe_trace.find_routers(plain), strict=True):
        assert site.info.experts_class == "FP8Experts"
        assert site.info.expert_flops_per_slot == bare.info.expert_flops_per_slot, "scales are no matrices"


def test_fp4_experts_count_the_matrices_and_not_the_bytes() -> None:
    plain = GPT_OSS.build()
    model: Any = GPT_OSS.build()
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    for site, bare in zip(moe_trace.find_routers(model), moe_trace.find_routers(plain), strict=True):
        assert site.info.expert_flops_per_slot == bare.info.expert_flops_per_slot > 0
    for layer in model.model.layers:  # a GPU's layout: no longer parameters at all
        packed = layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data
        del layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj = packed
    for site, bare in zip(moe_trace.find_routers(model), moe_trace.find_routers(plain), strict=True):
        assert site.info.expert_flops_per_slot == bare.info.expert_flops_per_slot
        assert site.info.num_experts == bare.info.num_experts


def test_packed_routers_count_their_sizes() -> None:
    """bitsandbytes keeps a [out, in] weight as [out * in / 2, 1]."""
    model: Any = BY_NAME["dbrx/text"].build()
    before = [site.info.router_flops_per_token for site in moe_trace.find_routers(model)]
    for block in model.transformer.blocks:
        gate = block.ffn.router.layer
        gate.weight = nn.Parameter(torch.zeros(gate.weight.numel() // 2, 1), requires_grad=False)
    assert [site.info.router_flops_per_token for site in moe_trace.find_routers(model)] == before


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
    fused = wrap(GPT_OSS.build(), ".mlp", FusedBlock)
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

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = StrangeExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(hidden, self.gate(hidden))


def test_an_unknown_contract_is_reported_and_not_guessed_at() -> None:
    with pytest.raises(NoRoutersFound) as none:
        moe_trace.find_routers(nn.Sequential(StrangeBlock()))
    message = str(none.value)
    assert "1 modules look like routed experts and follow none of them: 0.experts" in message
    assert "(StrangeExperts, called as (rows, plan))" in message
    assert "moe_trace.register_contract" in message


def test_an_unknown_contract_beside_known_ones_is_warned_about() -> None:
    model = nn.Sequential(TomorrowBlock("gate"), StrangeBlock())
    with pytest.warns(RuntimeWarning, match=r"1\.experts \(StrangeExperts, called as \(rows, plan\)\)"):
        sites = moe_trace.find_routers(model)
    assert [site.name for site in sites] == ["0.gate"]


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


def calls_of(model: nn.Module, family: Family) -> list[tuple[moe_trace.RouterSite, Call, Reading]]:
    """What the hooks of each router see in one forward, and what is read from it."""
    tracer = moe_trace.MoETracer(model)
    seen: list[tuple[moe_trace.RouterSite, Call, Reading]] = []
    for hooks in tracer._hooks:

        def keep(call: Call, site: moe_trace.RouterSite = hooks.site) -> Reading:
            seen.append((site, call, site.read(call)))
            return seen[-1][2]

        hooks._read = keep
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
