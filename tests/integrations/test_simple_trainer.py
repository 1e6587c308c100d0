"""Tests of `MoETraceCallback` in a real `Trainer`: metrics in logs, traces on schedule, hooks removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from models import tiny_olmoe, token_batch, watch_experts
from moe_trace import MoETraceCallback, Routes, read_summary

FIGURES = {
    "moe_load_max_over_mean",
    "moe_load_cv",
    "moe_router_entropy",
    "moe_router_confidence",
    "moe_skipped_share",
    "moe_aux_loss",
}


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    rows = token_batch(count, 8)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in rows]


class Reporter(TrainerCallback):
    """A reporter such as TensorBoard's: it writes what it is given, in its turn."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def make_trainer(
    folder: Path, *, model: Any = None, steps: int = 4, **options: Any
) -> tuple[Trainer, Reporter]:
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    reporter = Reporter()
    trainer = Trainer(
        model=model or tiny_olmoe(),
        args=arguments,
        train_dataset=examples(16),
        eval_dataset=examples(2),
        callbacks=[reporter],
    )
    return trainer, reporter


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def training_logs(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    return [log for log in logs if "loss" in log]


def test_figures_come_with_the_trainers_own_logs(tmp_path: Path) -> None:
    trainer, reporter = make_trainer(tmp_path, gradient_accumulation_steps=2)
    MoETraceCallback(per_layer=True).add_to(trainer)
    with watch_experts(trainer.model) as calls:
        trainer.train()
    assert len(training_logs(reporter.logs)) == 2
    for log, filed in zip(
        training_logs(reporter.logs), training_logs(trainer.state.log_history), strict=True
    ):
        layers = {f"{figure}/L{layer:02d}" for figure in FIGURES for layer in range(3)}
        assert {key for key in log if key.startswith("moe_")} == FIGURES | layers
        assert log.items() <= filed.items()
        assert filed["step"] in (2, 4)
    assert len(calls) == 3 * 2 * 4  # layers, forwards a step, steps
    expected = []
    for layer in range(3):
        for step in range(2):  # the steps of the first log
            of_step = [c for c in calls if c.layer == layer][2 * step : 2 * step + 2]
            counts = np.sum([c.assignments(8) for c in of_step], axis=0)
            expected.append(counts.max() / counts.mean())
    assert training_logs(reporter.logs)[0]["moe_load_max_over_mean"] == pytest.approx(np.mean(expected))
    assert hooks_on(trainer.model) == 0


def test_given_as_a_callback_it_reaches_the_history_but_not_earlier_reporters(tmp_path: Path) -> None:
    trainer, reporter = make_trainer(tmp_path)
    trainer.add_callback(MoETraceCallback())
    trainer.train()
    assert training_logs(trainer.state.log_history)[0].keys() >= FIGURES
    assert not any(key.startswith("moe_") for key in training_logs(reporter.logs)[0])


def test_traces_follow_the_schedule(tmp_path: Path) -> None:
    trainer, reporter = make_trainer(tmp_path, steps=5)
    callback = MoETraceCallback(
        tmp_path / "traces", schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    ).add_to(trainer)
    trainer.train()
    (trace,) = (tmp_path / "traces").glob("*.pt.trace.json")
    summary = read_summary(trace)
    assert summary.totals.calls == 2 * 3, "two steps are traced"
    assert summary.lost.samples_without_range == summary.lost.ranges_without_sample == 0
    assert list((tmp_path / "traces").glob("events.out.tfevents.*"))
    assert training_logs(reporter.logs)[1].keys() >= FIGURES
    assert callback.tracer is not None and set(callback.tracer.calls_by_router().values()) == {5}
    assert hooks_on(trainer.model) == 0


def test_evaluation_is_left_out(tmp_path: Path) -> None:
    trainer, reporter = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    callback = MoETraceCallback().add_to(trainer)
    trainer.train()
    assert callback.tracer is not None
    stages = {s.stage for s in callback.tracer.samples()}
    assert stages == {"train", "prefill"}, "the evaluation did not run inside"
    for log in reporter.logs:
        assert ("loss" in log) == any(key.startswith("moe_") for key in log)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [MoETraceCallback(tmp_path / "traces")]):
        trainer, _ = make_trainer(tmp_path, model=tiny_olmoe())
        for callback in callbacks:
            callback.add_to(trainer)
        trainer.train()
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_an_exception_in_the_training(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise ZeroDivisionError

    for folder in (None, tmp_path / "traces"):
        trainer, _ = make_trainer(tmp_path)
        trainer.add_callback(Fails())
        callback = MoETraceCallback(folder).add_to(trainer)
        with pytest.raises(ZeroDivisionError), callback:
            trainer.train()
        assert hooks_on(trainer.model) == 0
        callback.close()


def test_nothing_recorded_is_said(tmp_path: Path) -> None:
    model = tiny_olmoe()
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden: hidden
    trainer, reporter = make_trainer(tmp_path, model=model)
    MoETraceCallback().add_to(trainer)
    with pytest.warns(RuntimeWarning, match="no call of the 3 routers in 4 forwards"):
        trainer.train()
    assert not any(key.startswith("moe_") for log in reporter.logs for key in log)


def test_the_scalars_of_a_trace_stand_at_the_trainers_steps(tmp_path: Path) -> None:
    """What the Trainer logs at a step is what the trace's scalars have there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = make_trainer(tmp_path, steps=4)
    trainer.args.logging_steps = 1
    schedule = torch.profiler.schedule(wait=0, warmup=0, active=4, repeat=1)
    MoETraceCallback(tmp_path / "moe", schedule=schedule).add_to(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "moe"))
    events.Reload()
    written = {e.step: e.value for e in events.Scalars("moe_load_cv/mean")}
    logged = {log["step"]: log["moe_load_cv"] for log in trainer.state.log_history if "moe_load_cv" in log}
    assert set(written) == {1, 2, 3, 4} and set(logged) & set(written)
    for step, value in logged.items():
        assert value == pytest.approx(written[step], rel=1e-5)


def test_routes_of_a_training_are_what_the_experts_received(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, steps=2)
    callback = MoETraceCallback(routes=Routes(token_ids=True)).add_to(trainer)
    with watch_experts(trainer.model) as calls:
        trainer.train()
    assert callback.tracer is not None
    routes = callback.tracer.routes()
    received = [np.concatenate([c.index for c in calls if c.layer == layer]) for layer in range(3)]
    assert np.array_equal(routes.expert_ids, np.stack(received, 1))
    assert set(routes.stage) == {"train"} and routes.step.tolist() == [0] * 16 + [1] * 16
    assert routes.sequence.tolist() == ([0] * 8 + [1] * 8) * 2 and routes.position.tolist() == [*range(8)] * 4
    assert routes.token_ids is not None and (routes.token_ids >= 0).all()
