"""Routers of training frameworks, on their own code: counts equal an oracle's, outputs are equal to the bit.

`scripts/test_hosts.py` runs each in an environment that has its framework; elsewhere they skip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_trace

DIM, EXPERTS, TOP_K = 32, 8, 2


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def recorded(model: nn.Module, run: Callable[[], Any]) -> list[moe_trace.RoutingSample]:
    with moe_trace.MoETracer(model) as tracer:
        run()
    lost = tracer.recording().lost
    assert not lost.misread and not lost.calls, lost
    return tracer.samples()


def counts(sample: moe_trace.RoutingSample) -> list[int]:
    return [int(n) for n in sample.assignments]


def same_with_and_without(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Output and gradients are equal to the bit."""
    found = []
    for traced in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        if traced:
            with moe_trace.MoETracer(model):
                out = run()
                out.float().square().sum().backward()
        else:
            out = run()
            out.float().square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.detach().clone(), grads))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


# -- torchtitan -----------------------------------------------------------------------------------------


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
    same_with_and_without(moe, lambda: moe(x))


# -- OLMo-core ------------------------------------------------------------------------------------------


def olmo_core_router(version: int) -> Any:
    pytest.importorskip("olmo_core")
    if version == 1:
        from olmo_core.nn.moe.router import MoELinearRouter

        return randomised(MoELinearRouter(d_model=DIM, num_experts=EXPERTS, top_k=TOP_K))
    v2 = pytest.importorskip("olmo_core.nn.moe.v2.router", exc_type=ImportError)  # needs TransformerEngine
    return randomised(v2.MoERouterV2(d_model=DIM, num_experts=EXPERTS, top_k=TOP_K))


class OlmoCoreBlock(nn.Module):
    """OLMo-core's own router; its experts need Triton, so these only take what its block hands them."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, _Experts()

    def forward(self, x: Tensor) -> Tensor:
        out = self.router(x) if not hasattr(self.router, "orth_loss_weight") else self.router(x, False)
        weights, index, sizes = out[:3]
        flat = x.view(-1, DIM)
        return self.experts(flat, weights.flatten(0, -2), index.flatten(0, -2), sizes)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / 8)
        self.received: list[list[int]] = []

    def forward(self, x: Tensor, weights: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
        self.received.append(sizes.int().tolist())
        return torch.einsum("td,tkde,tk->te", x, self.w[index], weights)


@pytest.mark.parametrize("version", [1, 2])
def test_olmo_core_equals_its_own_counts(version: int) -> None:
    block = OlmoCoreBlock(olmo_core_router(version)).eval()
    (sample,) = recorded(block, lambda: block(torch.randn(2, 5, DIM)))
    assert [counts(sample)] == block.experts.received
    same_with_and_without(block, lambda: block(torch.ones(2, 5, DIM)))


# -- NeMo Automodel -------------------------------------------------------------------------------------


def automodel_moe() -> Any:
    pytest.importorskip("nemo_automodel")
    from nemo_automodel.components.models.common.utils import BackendConfig
    from nemo_automodel.components.moe.config import MoEConfig
    from nemo_automodel.components.moe.layers import MoE

    config = MoEConfig(
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_activated_experts=TOP_K,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        route_scale=1.0,
        dim=DIM,
        inter_dim=16,
        moe_inter_dim=16,
        norm_topk_prob=False,
        dtype=torch.float32,
    )
    backend = BackendConfig(
        attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch"
    )
    return randomised(MoE(config, backend))


def test_automodel_equals_its_own_load_and_leaves_masked_tokens_out() -> None:
    moe = automodel_moe().train()
    moe.gate._track_load_balance = True
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, :3] = True
    (sample,) = recorded(moe, lambda: moe(torch.randn(2, 5, DIM), padding_mask=padding))
    assert counts(sample) == moe.gate._last_expert_load.int().tolist()
    assert sum(counts(sample)) == 7 * TOP_K
    assert sample.skipped == 3 * TOP_K
    x = torch.randn(2, 5, DIM)
    same_with_and_without(moe, lambda: moe(x))


# -- Megatron-core --------------------------------------------------------------------------------------


@pytest.fixture
def megatron_router(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Without TransformerEngine Megatron names what it never imported; a CPU has no current CUDA device.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def build(**options: Any) -> Any:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=DIM,
            num_attention_heads=4,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOP_K,
            moe_router_load_balancing_type="none",
            use_cpu_initialization=True,
            **options,
        )
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups()
        return randomised(TopKRouter(config=config, pg_collection=groups))

    yield build
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


class MegatronBlock(nn.Module):
    """Megatron's own router, and experts that are handed rows as its dispatchers do."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, _SortedExperts()

    def forward(self, x: Tensor) -> Tensor:
        probs, routing_map = self.router(x)
        rows = x.reshape(-1, DIM)
        sizes = routing_map.sum(0)
        token = torch.cat([routing_map[:, e].nonzero().flatten() for e in range(EXPERTS)])
        self.experts(rows[token], sizes)
        return rows * probs.sum(-1, keepdim=True)


class _SortedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, DIM, DIM))
        self.received: list[list[int]] = []

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        self.received.append(sizes.tolist())
        return rows


@pytest.mark.parametrize("options", [{}, {"moe_expert_capacity_factor": 0.5}], ids=["all", "capacity"])
def test_megatron_equals_the_rows_that_enter_its_experts(megatron_router: Any, options: Any) -> None:
    block = MegatronBlock(megatron_router(**options)).train()
    x = torch.randn(6, 2, DIM)
    (sample,) = recorded(block, lambda: block(x))
    assert [counts(sample)] == block.experts.received
    assert sum(counts(sample)) + sample.skipped == 12 * TOP_K
    assert (sample.skipped > 0) == bool(options)


# -- DeepSpeed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_deepspeed_counts_what_capacity_kept(top_k: int) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    gate = TopKGate(
        DIM, EXPERTS, k=top_k, capacity_factor=0.5, eval_capacity_factor=0.5, min_capacity=1, use_rts=False
    )
    layer = randomised(MOELayer(gate, Experts(nn.Linear(DIM, DIM), EXPERTS), "ep", 1, EXPERTS)).eval()
    kept: list[Tensor] = []
    gate.register_forward_hook(lambda module, args, out: kept.append(out[3]))
    (sample,) = recorded(layer, lambda: layer(torch.randn(1, 24, DIM), None))
    index = kept[0]
    assert counts(sample) == torch.bincount(index[index >= 0].long(), minlength=EXPERTS).tolist()
    assert sample.skipped == int((index < 0).sum()) > 0


# -- transformers 4.57 ----------------------------------------------------------------------------------


def transformers_model(family: str) -> Any:
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 4.57 is not installed")
    sizes = {"vocab_size": 64, "hidden_size": DIM, "intermediate_size": 48, "num_attention_heads": 4}
    if family == "deepseek_v3":
        config: Any = transformers.DeepseekV3Config(
            **sizes,
            num_hidden_layers=3,
            moe_intermediate_size=16,
            num_key_value_heads=4,
            n_routed_experts=EXPERTS,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=TOP_K,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
        )
        model = transformers.DeepseekV3ForCausalLM(config)
    else:
        config = transformers.GptOssConfig(
            **sizes,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )
        model = transformers.GptOssForCausalLM(config)
    return randomised(model).eval()


def test_transformers_4_deepseek_equals_the_rows_that_enter_each_expert() -> None:
    model = transformers_model("deepseek_v3")
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda module, args: rows.__setitem__(name, rows.get(name, 0) + args[0].shape[0])

    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("mlp.experts"):
            module.register_forward_pre_hook(count(name))
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        samples = recorded(model, lambda: model(ids))
    assert len(samples) == 2
    for sample, layer in zip(samples, (1, 2), strict=True):
        entered = [rows.get(f"model.layers.{layer}.mlp.experts.{e}", 0) for e in range(EXPERTS)]
        assert counts(sample) == entered
    same_with_and_without(model, lambda: model(ids).logits)


def test_transformers_4_gpt_oss_equals_what_its_experts_are_told() -> None:
    model = transformers_model("gpt_oss")
    told: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            module.register_forward_pre_hook(
                lambda module, args, kwargs: told.append(kwargs["router_indices"]), with_kwargs=True
            )
    with torch.no_grad():
        samples = recorded(model, lambda: model(torch.randint(0, 64, (2, 7))))
    expected = [torch.bincount(index.flatten(), minlength=EXPERTS).tolist() for index in told]
    assert [counts(sample) for sample in samples] == expected
    assert all(sample.router_entropy is None for sample in samples)
