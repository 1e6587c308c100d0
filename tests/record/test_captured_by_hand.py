"""Routers on a GPU have the hooks of plain calls too, and none of them is missed when a stream is captured.

On any machine: whether weights are on a GPU, and whether a stream is captured, are answered by the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.record.graphs import memory
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.hooks import plain_calls, site
from moe_trace.record.hooks.plain_calls import PlainCalls

EXPERTS = 8


class FakeDevice:
    """A GPU whose streams run what they capture, once."""

    def __init__(self) -> None:
        self.present, self.captures = True, False
        self.notes: list[str] = []

    @contextmanager
    def graph(self) -> Iterator[None]:
        self.captures = True
        try:
            yield
        finally:
            self.captures = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(memory, "is_initialized", lambda: True)
    monkeypatch.setattr(memory, "is_current_stream_capturing", lambda: fake.captures)
    monkeypatch.setattr(plain_calls, "stream_is_captured", lambda: fake.captures)
    monkeypatch.setattr(site, "is_on_cuda", lambda _: fake.present)
    for edge in ("begin", "end"):
        monkeypatch.setattr(CaptureNotes, edge, noting(fake.notes, edge))
    return fake


def noting(notes: list[str], edge: str) -> Callable[..., None]:
    def note(self: CaptureNotes, name: str, *more: str) -> None:
        notes.append(f"{edge} {more[-1]}")

    return note


def run(model: Any, count: int = 8, first: int = 0) -> None:
    with torch.no_grad():
        for seed in range(first, first + count):
            model(**token_batch(2, 3, seed=seed))


def plain_hooks(module: torch.nn.Module) -> list[Any]:
    return [hook for hook in module._forward_hooks.values() if isinstance(hook.__self__, PlainCalls)]


@contextmanager
def a_tracer(model: Any, profiled: bool) -> Iterator[moe_trace.MoETracer]:
    if profiled:
        with moe_trace.profile(model) as prof:
            yield prof.tracer
    else:
        with moe_trace.MoETracer(model) as tracer:
            yield tracer


ONE_CALL = ["begin router", "end router", "begin experts", "end experts"]


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("captured", ["model", "block", "block inside a forward"])
def test_a_capture_between_plain_calls(device: FakeDevice, profiled: bool, captured: str) -> None:
    """It notes its routers and experts and writes into the rings; what runs eagerly is recorded as before."""
    model = tiny_olmoe(layers=2)
    block, inside = model.model.layers[0].mlp, [False]
    forward = block.forward

    def in_a_graph(hidden: torch.Tensor) -> Any:
        with device.graph() if inside[0] else nullcontext():
            return forward(hidden)

    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        for layer in model.model.layers:
            assert plain_hooks(layer.mlp.gate) and plain_hooks(layer.mlp.experts)
        assert not device.notes
        with torch.no_grad():
            if captured == "model":
                with device.graph():
                    model(**token_batch(1, 2))
            elif captured == "block":
                with device.graph():
                    block(torch.randn(1, 2, 32))
            else:
                block.forward, inside[0] = in_a_graph, True
                model(**token_batch(1, 2))
                inside[0] = False
        assert device.notes == ONE_CALL * (2 if captured == "model" else 1)
        run(model, first=20)
        assert plain_hooks(block.gate)
    expected = [c.assignments(EXPERTS) for c in calls]
    at = 8 * 2
    in_graph = {"model": [at, at + 1], "block": [at], "block inside a forward": [at]}[captured]
    samples = tracer.samples()
    eager = [s.assignments.tolist() for s in samples if not s.in_graph]
    assert eager == [counts for number, counts in enumerate(expected) if number not in in_graph]
    assert [s.assignments.tolist() for s in samples if s.in_graph] == [expected[n] for n in in_graph]
    assert not tracer.recording().lost.calls


@pytest.mark.parametrize("profiled", [False, True])
def test_a_capture_that_fails_between_a_router_and_its_experts(device: FakeDevice, profiled: bool) -> None:
    """As where something waits for the device there: the calls that follow are eager ones like others."""
    model = tiny_olmoe(layers=2)
    block, forward, fails = model.model.layers[1].mlp, model.model.layers[1].mlp.forward, [False]

    def failing(hidden: torch.Tensor) -> Any:
        if fails[0]:
            block.gate(hidden.flatten(0, 1))
            raise RuntimeError("operation not permitted when stream is capturing")
        return forward(hidden)

    block.forward = failing
    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        fails[0] = True
        with pytest.raises(RuntimeError), torch.no_grad(), device.graph():
            block(torch.randn(1, 2, 32))
        fails[0] = False
        run(model, first=20)
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(EXPERTS) for c in calls]
    assert not tracer.recording().lost.calls


def test_a_model_that_is_moved_to_a_gpu_under_a_tracer(device: FakeDevice) -> None:
    model = tiny_olmoe(layers=2)
    device.present = False
    with a_tracer(model, True):
        run(model)
        device.present = True
        with torch.no_grad(), device.graph():
            model(**token_batch(1, 2))
    assert device.notes == ONE_CALL * 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("profiled", [False, True])
def test_plain_hooks_become_part_of_compiled_code(device: FakeDevice, profiled: bool) -> None:
    model = tiny_olmoe(layers=2)
    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        assert plain_hooks(model.model.layers[0].mlp.gate)
    expected = [c.assignments(EXPERTS) for c in calls]
    with a_tracer(model, profiled) as tracer:
        run(model)
        for layer in model.model.layers:
            layer.mlp.compile(backend="eager", fullgraph=True)
        run(model)
    samples = sorted(tracer.samples(), key=lambda sample: (sample.call, sample.layer))
    assert [sample.assignments.tolist() for sample in samples] == expected * 2
    assert [sample.in_graph for sample in samples] == [False] * 16 + [True] * 16
