"""Routers inside wrappers, and with quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import moe_trace
from families.configs import BY_NAME
from families.family import Family

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
