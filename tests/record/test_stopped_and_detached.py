"""Tests of recording that stops inside a forward, and of tracers that detach from a profiler."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch


def counted(model: Any) -> list[int]:
    """How often each router has run, by a hook of our own that is never taken off."""
    runs = [0] * len(model.model.layers)
    for number, layer in enumerate(model.model.layers):

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        layer.mlp.gate.register_forward_hook(count)
    return runs


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("inside", ["", "gate", "experts"])
@pytest.mark.parametrize("make", [moe_trace.profile, moe_trace.MoETracer], ids=lambda make: make.__name__)
def test_stopping_inside_a_forward_loses_no_call_unsaid(make: Any, inside: str, layer: int) -> None:
    model = tiny_olmoe(layers=2)
    runs, tracing = counted(model), make(model)
    module = model.model.layers[layer].mlp.get_submodule(inside)
    forward = module.forward

    def stop_and_run(*args: Any, **kwargs: Any) -> Any:
        tracing.stop()
        return forward(*args, **kwargs)

    with torch.no_grad():
        tracing.start()
        for seed in range(3):
            model(**token_batch(2, 3, seed=seed))
        module.forward = stop_and_run
        model(**token_batch(2, 3))
        module.forward = forward
    tracer = getattr(tracing, "tracer", tracing)
    recording = tracer.recording()
    for number, site in enumerate(tracer.sites):
        recorded = sum(s.name == site.name for s in recording.samples)
        interrupted = recording.lost.calls.get(site.name, {}).get("interrupted", 0)
        missed = recording.lost.not_reached.get(site.name, 0)
        assert recorded + interrupted + missed == runs[number] == 4
        assert recorded == (4 if number < layer else 3)
    notes = " ".join(tracer.summary().notes)
    if layer == 0:
        assert "stop it between two forwards" in notes
    if inside:
        assert "run those forwards again, whole" in notes
    with torch.no_grad(), moe_trace.MoETracer(model) as whole:  # what the note says to do
        model(**token_batch(2, 3))
    lost = whole.recording().lost
    assert len(whole.samples()) == 2 and not lost.calls and not lost.not_reached


def test_a_profiler_gets_its_methods_back(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=1)
    prof = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    before, exported = set(prof.__dict__), prof.export_chrome_trace
    prof.export_chrome_trace = exported  # as when somebody else has patched it
    first, second = moe_trace.MoETracer(model), moe_trace.MoETracer(model, every=2)
    first.attach(prof)
    second.attach(prof)
    with torch.no_grad(), first, second, prof:
        model(**token_batch(1, 4))
    prof.export_chrome_trace(str(tmp_path / "with.json"))
    first.detach(prof)
    first.detach(prof)  # once more changes nothing
    assert prof.export_chrome_trace != exported
    second.detach(prof)
    assert prof.__dict__.pop("export_chrome_trace") == exported
    assert set(prof.__dict__) == before
    with torch.no_grad(), first:
        model(**token_batch(1, 4))
    assert first.samples()[-1].step == 0  # goes on from where the profiler was


def test_samples_since_a_step_are_the_last_of_all() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for seed in range(7):
            model(**token_batch(1, 4, seed=seed))
            if seed == 3:
                tracer.samples()  # reduces them, so that there are several batches
        every = tracer.samples()
        for step in range(9):
            since = tracer.samples(since_step=step)
            assert [(s.name, s.call, s.step) for s in since] == [
                (s.name, s.call, s.step) for s in every if s.step >= step
            ]


def test_a_merge_leaves_the_garbage_collector_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the whole process: other threads make garbage meanwhile."""
    monkeypatch.setattr(gc, "disable", lambda: pytest.fail("switched off"))
    model = tiny_olmoe(layers=1)
    with torch.no_grad(), moe_trace.profile(model) as prof:
        model(**token_batch(1, 4))
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
