"""NeMo Automodel's `Gate` and `MoE`, on its own code."""

from __future__ import annotations

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
    randomised,
    recomputes_the_same,
    recorded,
    report_shows_every_layer,
)

import moe_trace


def automodel_moe(**options: Any) -> Any:
    pytest.importorskip("nemo_automodel")
    from nemo_automodel.components.models.common.utils import BackendConfig
    from nemo_automodel.components.moe.config import MoEConfig
    from nemo_automodel.components.moe.layers import MoE

    told: dict[str, Any] = dict(
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
    config = MoEConfig(**told | options)
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
    computes_the_same(moe, lambda: moe(x))


def test_automodel_layers_recompute_and_are_reported(tmp_path: Any, capsys: Any) -> None:
    model = Layers(automodel_moe() for _ in range(3)).train()
    x = torch.randn(2, 5, DIM)
    recomputes_the_same(model, x)
    report_shows_every_layer(model, lambda: model(x), tmp_path, capsys)


@pytest.mark.parametrize(
    "options",
    [
        {"score_func": "sigmoid"},
        {"score_func": "sigmoid", "gate_bias_update_factor": 0.1},
        {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "sigmoid"},
        {"norm_topk_prob": True, "aux_loss_coeff": 0.01},
    ],
    ids=["sigmoid", "bias", "groups", "aux_loss"],
)
def test_automodel_equals_its_own_load_whatever_chooses(options: Any) -> None:
    moe = automodel_moe(**options).train()
    moe.gate._track_load_balance = True
    for _ in range(3):
        (sample,) = recorded(moe, lambda: moe(torch.randn(2, 9, DIM)))
        assert counts(sample) == moe.gate._last_expert_load.int().tolist()
        assert sum(counts(sample)) == 18 * TOP_K
    x = torch.randn(2, 9, DIM)
    computes_the_same(moe, lambda: moe(x))


def test_automodel_an_intervention_on_the_gate_moves_every_token() -> None:
    moe = automodel_moe().eval()
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2] = moe.gate.weight[5] = 1.0
    (sample,) = recorded(moe, lambda: moe(torch.rand(2, 5, DIM)))
    assert counts(sample) == [0, 0, 10, 0, 0, 10, 0, 0]


def test_automodel_flops_leave_shared_experts_apart() -> None:
    (site,) = moe_trace.find_routers(automodel_moe())
    assert site.info.router_flops_per_token == 2 * DIM * EXPERTS
    assert site.info.expert_flops_per_slot == 2 * 3 * DIM * 16
    assert site.info.shared_flops_per_token == 2 * 3 * DIM * 16
