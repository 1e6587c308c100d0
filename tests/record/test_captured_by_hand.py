"""Tests that routers on a GPU also have the hooks of plain calls, and miss no call during stream capture.

They run on any machine, because they replace the checks for weights on a GPU and for stream capture.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.record.graphs import memory
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.hooks import fast_hooks
from moe_trace.record.hooks.fast_hooks import PlainCalls

EXPERTS = 8


class FakeDevice:
    """A GPU whose streams run what they capture, once."""

    def __init__(self) -> None:
        self.present = True
        self._capturing: set[int] = set()
        self.notes: list[str] = []

    @property
    def captures(self) -> bool:
        """Whether the calling thread does."""
        return threading.get_ident() in self._capturing

    @contextmanager
    def graph(self) -> Iterator[None]:
        self._capturing.add(threading.get_ident())
        try:
            yield
        finally:
            self._capturing.discard(threading.get_ident())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(memory, "is_initialized", lambda: fake.present)
    monkeypatch.setattr(memory, "is_current_stream_capturing", lambda: fake.captures)
    monkeypatch.setattr(fast_hooks, "stream_is_captured", lambda: fake.captures)
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


@torch.no_grad()
def capture_call(device: FakeDevice, captured: str, model: Any, block: Any) -> None:
    """Capture one call of the model, of a block, or of a block while the model's forward runs eagerly."""
    forward = block.forward

    def in_a_graph(hidden: torch.Tensor) -> Any:
        with device.graph():
            return forward(hidden)

    if captured == "block inside a forward":
        block.forward = in_a_graph
        model(**token_batch(1, 2))
        block.forward = forward
        return
    with device.graph():
        model(**token_batch(1, 2)) if captured == "model" else block(torch.randn(1, 2, 32))


ONE_CALL = ["begin router", "end router", "begin experts", "end experts"]


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("captured", ["model", "block", "block inside a forward"])
def test_a_capture_between_plain_calls(device: FakeDevice, profiled: bool, captured: str) -> None:
    """It notes its routers and experts and writes into the rings; what runs eagerly is recorded as before."""
    model = tiny_olmoe(layers=2)
    block = model.model.layers[0].mlp
    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        for layer in model.model.layers:
            assert plain_hooks(layer.mlp.gate) and plain_hooks(layer.mlp.experts)
        assert not device.notes
        capture_call(device, captured, model, block)
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
    # Nobody is told that the capture failed where the block is not hooked: it may have been a fused one.
    expected = {} if profiled else {"model.layers.1.mlp.gate": {"unjoined": 1}}
    assert tracer.recording().lost.calls == expected


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("captured", ["model", "block", "block inside a forward"])
def test_a_model_that_is_moved_to_a_gpu_under_a_tracer(
    device: FakeDevice, captured: str, profiled: bool
) -> None:
    """Nothing ran on it before the capture: neither a forward nor the block."""
    model = tiny_olmoe(layers=2)
    block = model.model.layers[0].mlp
    device.present = False
    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        device.present = True
        capture_call(device, captured, model, block)
        assert device.notes == ONE_CALL * (2 if captured == "model" else 1)
    samples, received = tracer.samples(), [c.assignments(EXPERTS) for c in calls]
    assert sorted(s.assignments.tolist() for s in samples) == sorted(received)
    assert sum(s.in_graph for s in samples) == (2 if captured == "model" else 1)
    assert not tracer.recording().lost.calls and not tracer.recording().lost.experts_without_router


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("captured", ["model", "block"])
@pytest.mark.parametrize("at", ["gate", "experts"])
def test_another_thread_runs_eagerly_meanwhile(
    device: FakeDevice, at: str, captured: str, profiled: bool
) -> None:
    """As a graph's `capture_error_mode="thread_local"` lets it."""
    model = tiny_olmoe(layers=2)
    block, among = model.model.layers[1].mlp, [False]

    def meanwhile(module: Any, args: Any) -> None:
        if among[0] and device.captures:
            among[0] = False
            with ThreadPoolExecutor(1) as pool:
                pool.submit(run, model, 2, 50).result()
                pool.submit(run, model.model, 2, 60).result()

    (block.gate if at == "gate" else block.experts).register_forward_pre_hook(meanwhile)
    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        among[0] = True
        with torch.no_grad(), device.graph():
            model(**token_batch(1, 2)) if captured == "model" else block(torch.randn(1, 2, 32))
        assert not among[0]
        run(model, first=20)
    samples = tracer.samples()
    assert sum(s.in_graph for s in samples) == (2 if captured == "model" else 1)
    received = sorted(c.assignments(EXPERTS) for c in calls)
    assert sorted(s.assignments.tolist() for s in samples) == received
    assert {s.stage for s in samples} == {"prefill"}
    lost = tracer.recording().lost
    assert not lost.calls and not lost.experts_without_router and lost.hook_failure is None
    forwards = 8 + 4 + 8
    if not profiled:  # whose steps are not forwards
        assert [s.step for s in samples if not s.in_graph] == [n for n in range(forwards) for _ in range(2)]


def test_two_threads_capture_at_once(device: FakeDevice) -> None:
    """Blocks of one model: each graph writes what it was given."""
    model = tiny_olmoe(layers=1)
    block, inside = model.model.layers[0].mlp, threading.Barrier(2, timeout=20)
    block.experts.register_forward_pre_hook(lambda *_: inside.wait() * 0 or None if device.captures else None)

    def capture(seed: int) -> None:
        with torch.no_grad(), device.graph():
            block(torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(seed)))
            inside.wait()

    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model)
        with ThreadPoolExecutor(2) as pool:
            [*pool.map(capture, range(2))]
    received = [c.assignments(EXPERTS) for c in calls]
    # They write into one slot, as no forward of the model counts: the later one stays.
    assert next(s.assignments.tolist() for s in tracer.samples() if s.in_graph) in received[8:]
    assert device.notes.count("end experts") == 2
    assert not tracer.recording().lost.calls and not tracer._hooks.routers[0].capturing


def fuse(block: Any) -> None:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        _, weights, index = self.gate(tokens)
        return self.experts.forward(tokens, index, weights).view_as(hidden)  # type: ignore[no-any-return]

    block.forward = types.MethodType(forward, block)


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("warm", [1, 3])
@pytest.mark.parametrize("captured", ["model", "block"])
def test_a_fused_block_in_a_capture(device: FakeDevice, captured: str, warm: int, profiled: bool) -> None:
    model = tiny_olmoe(layers=2)
    for layer in model.model.layers:
        fuse(layer.mlp)
    with watch_gates(model) as calls, a_tracer(model, profiled) as tracer:
        run(model, warm)
        with torch.no_grad(), device.graph():
            model(**token_batch(1, 2)) if captured == "model" else model.model.layers[0].mlp(
                torch.randn(1, 2, 32)
            )
        run(model, first=20)
    samples = tracer.samples()
    assert sorted(s.assignments.tolist() for s in samples) == sorted(calls)
    assert sum(s.in_graph for s in samples) == (2 if captured == "model" else 1)
    assert not tracer.recording().lost.calls


@contextmanager
def watch_gates(model: Any) -> Iterator[list[list[int]]]:
    calls: list[list[int]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        calls.append(torch.bincount(output[2].flatten(), minlength=EXPERTS).tolist())

    handles = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("profiled", [False, True])
def test_a_block_that_is_fused_in_its_capture_alone_is_counted(device: FakeDevice, profiled: bool) -> None:
    """Experts that were called as a module before are not taken for fused ones."""
    model = tiny_olmoe(layers=1)
    block = model.model.layers[0].mlp
    with watch_experts(model) as calls, a_tracer(model, profiled) as tracer:
        run(model)
        fuse(block)
        with torch.no_grad(), device.graph():
            block(torch.randn(1, 2, 32))
        del block.forward
        run(model, first=20)
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(EXPERTS) for c in calls]
    assert tracer.recording().lost.calls == {"model.layers.0.mlp.gate": {"unjoined": 1}}


def test_layers_that_share_a_router_in_a_capture(device: FakeDevice) -> None:
    model = tiny_olmoe(layers=3)
    for layer in model.model.layers[1:]:
        layer.mlp.gate = model.model.layers[0].mlp.gate
    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model, 3)
        with torch.no_grad(), device.graph():
            model(**token_batch(1, 2))
        run(model, 3, first=20)
    samples = tracer.samples()
    assert sorted(s.assignments.tolist() for s in samples) == sorted(c.assignments(EXPERTS) for c in calls)
    assert [s.layer for s in samples if s.in_graph] == [0, 1, 2]


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
