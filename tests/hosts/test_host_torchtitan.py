"""torchtitan's routers, on its own code: eager, recomputed, and compiled per block as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import (
    DIM,
    EXPERTS,
    TOP_K,
    Layers,
    computes_the_same,
    counts,
    in_traces,
    randomised,
    recomputes_the_same,
    recorded,
    report_shows_every_layer,
)
from torch import Tensor, nn

import moe_trace


def torchtitan_moe(shared: bool = False, score_func: str = "sigmoid") -> Any:
    pytest.importorskip("torchtitan")
    from torchtitan.models.common.config_utils import (
        make_ffn_config,
        make_moe_config,
        make_routed_experts_config,
        make_router_config,
    )

    init = {"weight": nn.init.normal_}
    experts_init = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), nn.init.normal_)
    config = make_moe_config(
        num_experts=EXPERTS,
        router=make_router_config(
            dim=DIM, num_experts=EXPERTS, gate_param_init=init, top_k=TOP_K, score_func=score_func
        ),
        routed_experts=make_routed_experts_config(
            dim=DIM,
            hidden_dim=16,
            num_experts=EXPERTS,
            top_k=TOP_K,
            param_init=experts_init,
            comm_backend="standard",
        ),
        shared_experts=make_ffn_config(dim=DIM, hidden_dim=16, w1_param_init=init, w2w3_param_init=init)
        if shared
        else None,
    )
    return randomised(config.build())


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_torchtitan_equals_its_own_buffer(score_func: str) -> None:
    moe = torchtitan_moe(score_func=score_func).train()
    x = torch.randn(2, 5, DIM)
    (sample,) = recorded(moe, lambda: moe(x))
    assert counts(sample) == moe.tokens_per_expert_E.int().tolist()
    logits = moe.router.gate(x).reshape(-1, EXPERTS)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert sample.router_entropy == pytest.approx(entropy.item(), rel=1e-4)


def test_torchtitan_counts_what_an_intervention_on_the_bias_forces() -> None:
    moe = torchtitan_moe().eval()
    moe.expert_bias_E[:] = 0
    moe.expert_bias_E[[3, 6]] = 1e4
    (sample,) = recorded(moe, lambda: moe(torch.randn(1, 7, DIM)))
    assert counts(sample) == [0, 0, 0, 7, 0, 0, 7, 0]


def test_torchtitan_flops_leave_shared_experts_apart() -> None:
    (site,) = moe_trace.find_routers(torchtitan_moe(shared=True))
    assert site.info.expert_flops_per_slot == 2 * 3 * DIM * 16
    assert site.info.shared_flops_per_token == 2 * 3 * DIM * 16


def test_torchtitan_computes_the_same_with_the_tracer() -> None:
    moe = torchtitan_moe().train()
    x = torch.randn(2, 5, DIM)
    computes_the_same(moe, lambda: moe(x))


class TransformerBlock(nn.Module):
    """What torchtitan compiles: here the MoE alone."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = torchtitan_moe(shared=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


def test_torchtitan_layers_recompute_and_are_reported(tmp_path: Any, capsys: Any) -> None:
    model = Layers(torchtitan_moe(shared=True) for _ in range(3)).train()
    x = torch.randn(2, 5, DIM)
    recomputes_the_same(model, x)
    report_shows_every_layer(model, lambda: model(x), tmp_path, capsys)


@torch._dynamo.config.patch(
    capture_scalar_outputs=False, skip_fwd_side_effects_in_bwd_under_checkpoint=False
)  # what apply_compile sets, it leaves set
def test_torchtitan_compiled_per_block_equals_its_buffers(tmp_path: Any, capsys: Any) -> None:
    """By its own `apply_compile`, which compiles each block as one graph."""
    blocks = [TransformerBlock() for _ in range(2)]
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.compile import apply_compile

    model = Layers(blocks).train()
    one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    apply_compile(model, compile_config=CompileConfig(enable=True), parallel_dims=one)
    x = torch.randn(2, 5, DIM)
    with moe_trace.MoETracer(model) as tracer:
        for _ in range(3):
            for block in blocks:
                block.moe.tokens_per_expert_E.zero_()
            model(x).square().sum().backward()
            told = [block.moe.tokens_per_expert_E.int().tolist() for block in blocks]
            samples = tracer.samples()
            assert [counts(sample) for sample in samples[-2:]] == told
    assert len(samples) == 6 and all(sample.in_graph for sample in samples)
    report_shows_every_layer(model, lambda: model(x), tmp_path, capsys, timed=False)


def test_torchtitan_forced_balance() -> None:
    moe = torchtitan_moe().train()
    moe.router._debug_force_load_balance = True
    (sample,) = recorded(moe, lambda: moe(torch.randn(2, 8, DIM)))
    assert counts(sample) == moe.tokens_per_expert_E.int().tolist() == [4] * EXPERTS


def test_torchtitan_profiler_writes_the_routing(tmp_path: Path) -> None:
    """Two cycles of its own profiler, which asks for a process group."""
    profiler = pytest.importorskip("torchtitan.tools.profiler")
    model = Layers(torchtitan_moe() for _ in range(3)).train()
    loads: list[list[int]] = []
    config = profiler.Profiler.Config(
        enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=2
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with moe_trace.MoETracer(model), config.build().active(base_folder=str(tmp_path / "out")) as prof:
            for _ in range(6):
                loads += _loads_of_one_forward(model)
                prof.step()
    finally:
        torch.distributed.destroy_process_group()
    assert in_traces(tmp_path / "out") == [loads[3:9], loads[12:18]]


def _loads_of_one_forward(model: Layers) -> list[list[int]]:
    for moe in model.layers:
        moe.tokens_per_expert_E.zero_()
    model(torch.randn(2, 5, DIM))
    return [moe.tokens_per_expert_E.int().tolist() for moe in model.layers]
