"""Megatron-core's `MoELayer` with its `TopKRouter`, on its own code and on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_checks import (
    DIM,
    EXPERTS,
    TOP_K,
    Layers,
    RowsEntered,
    computes_the_same,
    counts,
    flops_are_those_that_torch_counts,
    in_traces,
    randomised,
    recomputes_the_same,
    recorded,
    report_shows_every_layer,
)
from torch import Tensor

import moe_trace


@pytest.fixture
def megatron_moe(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Without TransformerEngine Megatron names what it never imported; a CPU has no current CUDA device.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def build(**options: Any) -> Any:
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer

        told: dict[str, Any] = {
            **{"num_layers": 1, "hidden_size": DIM, "ffn_hidden_size": 48, "num_attention_heads": 4},
            **{
                "num_moe_experts": EXPERTS,
                "moe_router_topk": TOP_K,
                "moe_token_dispatcher_type": "allgather",
            },
            **{"moe_router_load_balancing_type": "none", "add_bias_linear": False},
            **{"use_cpu_initialization": True, "moe_shared_expert_intermediate_size": 16},
        }
        spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
        return randomised(MoELayer(TransformerConfig(**told | options), spec.submodules)).train()

    yield build
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


CHOICES: dict[str, dict[str, Any]] = {
    "topk": {},
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "capacity_by_position": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "top1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
    "jitter": {"moe_input_jitter_eps": 0.3},
}


@pytest.mark.parametrize("how", CHOICES)
def test_megatron_equals_the_rows_that_enter_its_experts(megatron_moe: Any, how: str) -> None:
    layer = megatron_moe(**CHOICES[how])
    oracle = RowsEntered(layer.experts.local_experts)
    top_k = CHOICES[how].get("moe_router_topk", TOP_K)
    for _ in range(3):
        (sample,) = recorded(layer, lambda: layer(torch.randn(6, 2, DIM)))
        assert counts(sample) == oracle.take()
        assert sum(counts(sample)) + sample.skipped == 12 * top_k
        assert (sample.skipped > 0) == ("capacity" in how)
    x = torch.randn(6, 2, DIM)
    computes_the_same(layer, lambda: layer(x)[0])


def test_megatron_equals_its_own_buffer(megatron_moe: Any) -> None:
    layer = megatron_moe(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    layer.router.expert_bias.normal_()
    layer.router.local_tokens_per_expert.zero_()
    (sample,) = recorded(layer, lambda: layer(torch.randn(6, 2, DIM)))
    assert counts(sample) == layer.router.local_tokens_per_expert.int().tolist()


def test_megatron_padding_up_to_a_capacity_is_not_counted(megatron_moe: Any) -> None:
    layer = megatron_moe(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)
    kept: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, args, out: kept.append(out[1] & (out[0] > 0)))
    (sample,) = recorded(layer, lambda: layer(torch.randn(6, 2, DIM)))
    assert counts(sample) == kept[0].sum(0).tolist()
    assert sample.computed_slots == 3 * EXPERTS


def test_megatron_flops_are_those_that_torch_counts(megatron_moe: Any) -> None:
    layer = megatron_moe()
    flops_are_those_that_torch_counts(layer, lambda: layer(torch.randn(6, 2, DIM)))


def test_megatron_layers_recompute_and_are_reported(megatron_moe: Any, tmp_path: Any, capsys: Any) -> None:
    model = Layers(megatron_moe() for _ in range(3)).train()
    x = torch.randn(6, 2, DIM)
    recomputes_the_same(model, x)
    report_shows_every_layer(model, lambda: model(x), tmp_path, capsys)


def test_megatron_profile_writes_the_routing(megatron_moe: Any, tmp_path: Any) -> None:
    """`--profile --use-pytorch-profiler --profile-step-start 2 --profile-step-end 4 --train-iters 4`.

    Its training loop is not in the package: the profiler is made, stepped and stopped where that does it.
    """
    start, end, microbatches = 2, 4, 2
    model = Layers((megatron_moe() for _ in range(3)), lambda layer, x: layer(x)[0]).train()
    oracles = [RowsEntered(layer.experts.local_experts) for layer in model.layers]
    optimizer = torch.optim.Adam(model.parameters())
    prof = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=start - 1, warmup=1, active=end - start, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(tmp_path / "torch_profile" / "rank-0.json.gz")),
    )
    (tmp_path / "torch_profile").mkdir()
    entered: list[list[int]] = []
    with moe_trace.MoETracer(model):
        prof.start()
        for _ in range(end):
            prof.step()
            for _ in range(microbatches):
                model(torch.randn(6, 2, DIM)).square().mean().backward()
                entered += [oracle.take() for oracle in oracles]
            optimizer.step()
        prof.stop()
    # Stepped ahead of each: recorded are the iterations 2 and 3 as the loop logs them, counted from 1.
    per_step = microbatches * len(oracles)
    assert in_traces(tmp_path / "torch_profile") == [entered[(start - 1) * per_step : (end - 1) * per_step]]
