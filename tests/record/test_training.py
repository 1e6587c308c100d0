"""Tests of training: accumulation, checkpointing, mixed precision, anomaly mode, scalars, auxiliary loss."""

from __future__ import annotations

import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.integrations.scalar_logger import _STEPS_MAX as STEPS_MAX

EXPERTS = 8


def loss_of(model: Any, seed: int = 1) -> torch.Tensor:
    batch = token_batch(2, 12, seed=seed)
    return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def train_model(**changes: Any) -> Any:
    model = tiny_olmoe(layers=2, **changes).train()
    model.set_experts_implementation("grouped_mm")
    return model


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_gradients_and_counts(reentrant: bool | None, autocast: bool) -> None:
    """Gradient accumulation over two micro-batches, an optimiser's step, evaluation, and again."""

    def run(model: Any) -> tuple[list[float], list[torch.Tensor]]:
        if reentrant is not None:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(2):
            for micro in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(model, seed=2 * step + micro)
                (loss / 2).backward()
                losses.append(float(loss.detach()))
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
                model.eval()
                with torch.inference_mode():
                    losses.append(float(loss_of(model, seed=9)))
                model.train()
        return losses, gradients(model)

    bare_losses, bare = run(train_model())
    model = train_model()
    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        losses, traced = run(model)
    assert losses == bare_losses
    assert all(torch.equal(a, b) for a, b in zip(traced, bare, strict=True))
    samples = tracer.samples()
    stages = Counter((s.phase, s.stage) for s in samples)
    assert stages["forward", "train"] == 2 * 4
    assert stages["forward", "prefill"] == 2
    assert stages["recompute", "train"] == (0 if reentrant is None else 2 * 4)
    assert [s.assignments.tolist() for s in samples] == [c.assignments(EXPERTS) for c in calls]
    load = sum(router.tokens for router in tracer.summary().routers)
    assert load == sum(s.tokens for s in samples if s.phase == "forward")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_calls_keep_no_graph_and_end_with_their_backward(reentrant: bool) -> None:
    """Else the next forward would begin with taking the graphs apart, and with their reduction."""
    model = train_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with moe_trace.MoETracer(model) as tracer:
        for _ in range(2):
            loss_of(model).backward()
            groups = tracer._recorder._pending.groups()
            assert "recompute" in {record.phase for group in groups for record in group.records}
            kept = [tensor for group in groups for column in group.columns for tensor in column]
            assert not any(tensor.requires_grad for tensor in kept)
            assert not tracer._hooks.calls._log.items
        model.model.layers[0].register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model).backward()
        model.model.layers[0]._backward_hooks.clear()
        loss_of(model).backward()
        assert not tracer._hooks.calls._log.items
    phases = Counter(s.phase for s in tracer.samples())
    assert phases["forward"] == 4 * len(tracer.sites) and phases["recompute"] >= 3 * len(tracer.sites)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_checkpointed_as_a_whole_counts_its_steps_once(reentrant: bool) -> None:
    """The backward runs the model's own forward again: no step, and part of the one that it recomputes."""
    model = train_model()
    embed = model.get_input_embeddings()
    with watch_experts(model) as calls, moe_trace.MoETracer(model, every=2) as tracer:
        for seed in range(3):
            hidden = embed(token_batch(2, 12, seed=seed)["input_ids"]).detach().requires_grad_()
            logits = checkpoint(lambda x: model(inputs_embeds=x).logits, hidden, use_reentrant=reentrant)
            logits.sum().backward()
    samples = tracer.samples()
    assert [(s.step, s.phase) for s in samples if s.layer == 0] == [
        (0, "forward"),
        (0, "recompute"),
        (2, "forward"),
        (2, "recompute"),
    ]
    assert tracer.forwards_seen == 3
    counts = [c.assignments(EXPERTS) for c in calls]
    assert [s.assignments.tolist() for s in samples] == counts[:4] + counts[8:]


def test_anomaly_mode_changes_nothing() -> None:
    def run(model: Any) -> list[torch.Tensor]:
        with torch.autograd.detect_anomaly(check_nan=True):
            loss_of(model).backward()
        return gradients(model)

    bare, model = run(train_model()), train_model()
    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        traced = run(model)
    assert all(torch.equal(a, b) for a, b in zip(traced, bare, strict=True))
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(EXPERTS) for c in calls]


def test_compiled_training_with_evaluation_in_between() -> None:
    """Accumulated gradients, inference mode and back: the rings take decisions in both."""

    def run(model: Any) -> list[torch.Tensor]:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        for seed in (1, 2):
            (loss_of(model, seed) / 2).backward()
        model.eval()
        with torch.inference_mode():
            loss_of(model, 3)
        model.train()
        loss_of(model, 4).backward()
        return gradients(model)

    torch._dynamo.reset()
    reference, expected = train_model(), []
    for seed in (1, 2, 3, 4):
        with watch_experts(reference) as calls, torch.no_grad():
            loss_of(reference, seed)
        expected += [c.assignments(EXPERTS) for c in calls]
    bare, model = run(train_model()), train_model()
    torch._dynamo.reset()
    with moe_trace.MoETracer(model) as tracer:
        traced = run(model)
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(traced, bare, strict=True))
    samples = tracer.samples()
    assert [s.assignments.tolist() for s in samples] == expected
    assert [s.stage for s in samples if s.layer == 0] == ["train", "train", "prefill", "train"]
    assert all(s.in_graph for s in samples)


def test_batches_of_loader_workers() -> None:
    model = train_model().eval()
    data = [token_batch(1, 12, seed=i)["input_ids"][0] for i in range(4)]
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1)  # type: ignore[arg-type]
    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer, torch.no_grad():
        for ids in loader:
            model(input_ids=ids)
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(EXPERTS) for c in calls]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auxiliary_loss_equals_that_of_transformers(top_k: int, dtype: torch.dtype) -> None:
    model = tiny_olmoe(layers=2, top_k=top_k).to(dtype)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        output = model(**token_batch(3, 20), output_router_logits=True)
    samples = {s.layer: s for s in tracer.samples()}
    for layer, logits in enumerate(output.router_logits):
        expected = float(load_balancing_loss_func((logits.float(),), EXPERTS, top_k))
        assert samples[layer].aux_loss == pytest.approx(expected, rel=1e-5)
    decisions = tracer.summary().routers[0].decisions
    assert decisions.aux_loss_mean == samples[0].aux_loss


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("compiled", [False, True])
def test_scalars_of_a_whole_run(tmp_path: Path, compiled: bool) -> None:
    model, expected = train_model(), {}
    if compiled:
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    reference = train_model()
    with moe_trace.MoETracer(model, every=3) as tracer, moe_trace.ScalarLogger(tracer, tmp_path) as logger:
        for step in range(10):
            loss_of(model, seed=step).backward()
            logger.step()
        logger.close()
        assert tracer.samples() == []  # what was written is forgotten
    for step in (0, 3, 6, 9):
        with watch_experts(reference) as calls:
            loss_of(reference, seed=step)
        counts = torch.tensor(calls[0].assignments(EXPERTS), dtype=torch.float64)
        expected[step] = float(counts.max() / counts.mean())
    found = scalars_in(tmp_path)
    assert dict(found["moe_load_max_over_mean/L00"]) == pytest.approx(expected, rel=1e-6)
    assert len(found["moe_load_max_over_mean/L00"]) == 4
    assert all(math.isfinite(value) for _, value in found["moe_aux_loss/mean"])
    assert logger.steps_dropped == 0


def test_scalars_of_compiled_steps_of_several_forwards() -> None:
    """The writer empties the rings while the next step is under way: its forwards must stay known."""
    torch._dynamo.reset()
    model = train_model().eval()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        tracer.count_steps_by_hand()
        written = []
        loss_of(model)  # compiles
        for _ in range(4):
            loss_of(model)
            tracer.step()
            batches = tracer.take_batches()
            loss_of(model)
            loss_of(model)
            written += tracer.samples_of(batches)  # as the writer's thread does, late
        written += tracer.samples()
    torch._dynamo.reset()
    assert Counter(s.step for s in written) == {0: 4, 1: 6, 2: 6, 3: 6, 4: 4}
    assert tracer.recording().lost.overwritten == 0


def test_a_writer_that_fails_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    model = train_model()
    with moe_trace.MoETracer(model) as tracer:
        logger = moe_trace.ScalarLogger(tracer, blocked)
        for _ in range(3):
            loss_of(model)
            logger.step()
        with pytest.warns(RuntimeWarning, match="are incomplete"):
            logger.close()
    assert all(thread.name != "moe_trace scalars" for thread in threading.enumerate())


def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    """A tracer keeps nothing of a step that ended, the logger that of a few: a million need what some do."""
    model = train_model().eval()
    with (
        moe_trace.MoETracer(model, capacity=2) as tracer,
        moe_trace.ScalarLogger(tracer, tmp_path) as logger,
    ):
        for _ in range(200):
            with torch.no_grad():
                model(**token_batch(1, 2))
            logger.step()
            assert tracer._recorder._kept <= 2 and not tracer._recorder._pending.calls
            assert len(logger._steps) < STEPS_MAX
    assert not logger._held and not logger.steps_dropped and not tracer.recording().lost.overwritten
    assert len(scalars_in(tmp_path)["moe_load_max_over_mean/L00"]) == 200
