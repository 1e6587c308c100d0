"""TRL's `SFTTrainer` on transformers' OLMoE, under a profiler that a callback steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import EXPERTS, in_traces
from transformers import TrainerCallback

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.demo import load_demo_model

STEPS, LAYERS = 4, 3


class StepProfiler(TrainerCallback):
    def __init__(self, prof: torch.profiler.profile) -> None:
        self.prof = prof

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.prof.step()


def sft_trainer(model: Any, folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = token_batch(2 * STEPS)["input_ids"].tolist()
    told = {"max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    config = trl.SFTConfig(str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, **told)
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=load_demo_model()[1],
    )


def test_trl_sft_trainer_under_a_profiler_writes_the_routing(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=LAYERS)
    trainer = sft_trainer(model, tmp_path / "out")
    with (
        moe_trace.MoETracer(model),
        torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(tmp_path / "traces")),
        ) as prof,
        watch_experts(model) as calls,
    ):
        trainer.add_callback(StepProfiler(prof))
        trainer.train()
    entered = [call.assignments(EXPERTS) for call in calls]
    assert len(entered) == STEPS * LAYERS
    assert in_traces(tmp_path / "traces") == [entered[2 * LAYERS :]]


def test_trl_sft_trainer_takes_our_callback(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=LAYERS)
    trainer = sft_trainer(model, tmp_path / "out")
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    moe_trace.MoETraceCallback(tmp_path / "traces", schedule=schedule).add_to(trainer)
    with watch_experts(model) as calls:
        trainer.train()
    entered = [call.assignments(EXPERTS) for call in calls]
    assert in_traces(tmp_path / "traces") == [entered[2 * LAYERS :]]
