"""Tests of repeated forwards, which are recorded in columns: as correct as one by one, or not recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts


def in_columns(tracer: moe_trace.MoETracer) -> list[int]:
    """Counts the forwards that were taken so."""
    plain, taken = tracer._hooks.calls._plain, [0]
    take = plain._take

    def counted(plan: Any, items: Any, contexts: Any) -> bool:
        done = take(plan, items, contexts)
        taken[0] += done * len(contexts)
        return done

    plain._take = counted  # type: ignore[method-assign,assignment]
    return taken


def assert_as_received(tracer: moe_trace.MoETracer, calls: list[Any]) -> None:
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(8) for c in calls]
    numbers: dict[str, list[int]] = {}
    for sample in tracer.samples():
        numbers.setdefault(sample.name, []).append(sample.call)
    assert all(found == list(range(len(found))) for found in numbers.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_plain_run_is_taken_in_columns(mode: Any) -> None:
    model = tiny_olmoe()
    with mode(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        taken = in_columns(tracer)
        for seed in range(50):  # prompts and single tokens in turn
            model(**token_batch(2, 1 + 7 * (seed % 3 == 0), seed=seed))
    assert_as_received(tracer, calls)
    assert taken[0] >= 40
    assert not tracer.recording().lost.calls


def test_padding_is_kept_in_columns() -> None:
    model, batch = tiny_olmoe(), token_batch(2, 8)
    batch["attention_mask"][0, :3] = 0
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        taken = in_columns(tracer)
        for _ in range(10):
            model(**batch)
    assert taken[0] >= 4
    assert {s.padding_assignments for s in tracer.samples()} == {3 * 2}


def test_a_forward_unlike_the_others_in_between() -> None:
    """One that raises, one in a thread's place, one with another dtype, one with an experts call too many."""
    model = tiny_olmoe()
    layer = model.model.layers[0].mlp

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        taken = in_columns(tracer)
        for seed in range(12):
            model(**token_batch(2, 4, seed=seed))
        layer(torch.randn(1, 3, 32))
        handle = model.model.layers[1].mlp.gate.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**token_batch(2, 4))
        handle.remove()
        for seed in range(12):
            model(**token_batch(2, 4, seed=seed))
        with torch.autocast("cpu", torch.bfloat16):
            model(**token_batch(2, 4))
        model(**token_batch(2, 4))
    assert_as_received(tracer, calls)
    assert taken[0] >= 14
    assert tracer.recording().lost.calls == {"model.layers.1.mlp.gate": {"interrupted": 1}}


class Ring:
    """A router's forward that hands out fresh memory at first, and then a few buffers in turn."""

    def __init__(self, forward: Callable[..., Any], fresh: int, buffers: int) -> None:
        self.forward, self.fresh, self.buffers = forward, fresh, buffers
        self.calls, self.kept = 0, list[Any]()

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        outputs = self.forward(hidden_states)
        self.calls += 1
        if self.calls <= self.fresh:
            return outputs
        if len(self.kept) < self.buffers:
            self.kept.append(tuple(output.clone() for output in outputs))
            return self.kept[-1]
        oldest = self.kept.pop(0)
        self.kept.append(oldest)
        for buffer, output in zip(oldest, outputs, strict=True):
            buffer.numpy()[:] = output.numpy()  # as kernels do, of which a tensor's version tells nothing
        return oldest


@pytest.mark.parametrize(("fresh", "buffers"), [(0, 1), (0, 7), (6, 3), (20, 1), (20, 30)])
def test_a_router_that_starts_to_write_over_what_it_returned(fresh: int, buffers: int) -> None:
    """Copied or counted, and copied from then on: what is recorded is what the experts received."""
    model = tiny_olmoe(layers=2)
    gate = model.model.layers[1].mlp.gate
    gate.forward = Ring(gate.forward, fresh, buffers)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        for seed in range(100):
            if seed == 60:
                tracer.samples()  # they would wait for 1024 calls to be reduced, and looked at, together
            model(**token_batch(1, 3, seed=seed))
    name = "model.layers.1.mlp.gate"
    lost = tracer.recording().lost
    missing = lost.calls.get(name, {}).get("rewritten", 0)
    samples = [s for s in tracer.samples() if s.name == name]
    received = [c.assignments(8) for i, c in enumerate(calls) if i % 2]
    assert len(samples) + missing == lost.calls_seen[name] == 100
    assert [s.assignments.tolist() for s in samples] == [received[s.call] for s in samples]
    assert [s.call for s in samples][-40:] == list(range(60, 100))
    assert (missing > 0) == (fresh > 0 or buffers > 4)


def test_what_the_user_writes_into_a_routers_output_is_noticed() -> None:
    """After the forward, before it is reduced: a loss that scales logits in place, from some step on."""
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for seed in range(40):
            output = model(**token_batch(1, 3, seed=seed), output_router_logits=True)
            if seed >= 10:
                output.router_logits[0].zero_()
    lost = tracer.recording().lost.calls["model.layers.0.mlp.gate"]["rewritten"]
    samples = [s for s in tracer.samples() if s.layer == 0]
    assert 0 < lost < 40 and len(samples) == 40 - lost
    assert all(
        s.router_entropy is not None and s.router_entropy < 2.079 for s in samples
    )  # ln 8 if all are 0
