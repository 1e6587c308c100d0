"""NeMo Automodel's `Gate` and `MoE`, on its own code."""

from __future__ import annotations

from types import SimpleNamespace
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


def test_automodel_recipe_under_a_profiler_writes_the_routing(tmp_path: Any) -> None:
    """Its own loop over its `StepScheduler`; it starts no torch.profiler, so the optimizer's steps are told.

    The step itself is the test's: the recipe's wants a checkpoint of a whole language model.
    """
    train_ft = pytest.importorskip("nemo_automodel.recipes.llm.train_ft")
    from nemo_automodel.components.training.step_scheduler import StepScheduler

    class Recipe(train_ft.TrainFinetuneRecipeForNextTokenPrediction):  # type: ignore[misc, name-defined]
        def _run_train_optim_step(self, batches: Any, max_grad_norm: float | None = None) -> Any:
            for batch in batches:
                self.model_parts[0](batch).square().mean().backward()
                loads.extend(
                    [moe.gate._last_expert_load.int().tolist() for moe in self.model_parts[0].layers]
                )
            self.optimizer[0].step()
            return SimpleNamespace(metrics={"loss": 0.0})

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

    model = Layers(automodel_moe() for _ in range(3))
    loads: list[list[int]] = []
    for moe in model.layers:
        moe.gate._track_load_balance = True
        moe.gate.weight.data /= 10  # else a softmax underflows to 0, which is no assignment
    recipe = Recipe({})
    recipe.step_scheduler = StepScheduler(
        global_batch_size=2,
        local_batch_size=1,
        dp_size=1,
        dataloader=[torch.randn(2, 5, DIM) for _ in range(12)],
        num_epochs=1,
        save_checkpoint_every_epoch=False,
        ckpt_every_steps=100,
        preemption_signal=None,
    )
    recipe.max_grad_norm, recipe.val_dataloaders, recipe.metric_logger_valid = None, {}, {}
    recipe.metric_logger_train = SimpleNamespace(close=lambda: None)
    recipe.best_metric_key, recipe.log_train_metrics = "loss", lambda log_data: None
    recipe.model_parts = [model]
    recipe.optimizer = [torch.optim.Adam(model.parameters())]
    with (
        moe_trace.MoETracer(recipe.model_parts[0]),
        torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(tmp_path)),
        ) as prof,
    ):
        recipe.optimizer[0].register_step_post_hook(lambda *_: prof.step())
        recipe.run_train_validation_loop()
    assert len(loads) == 6 * 2 * 3
    assert in_traces(tmp_path) == [loads[2 * 6 : 4 * 6]]
