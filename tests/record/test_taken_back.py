"""Tests that calls recorded as fused become unknown everywhere if experts are later called as a module."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace import RecordedRoutes, Routes
from moe_trace.record.calls.refusals import CallNumbers, Refusals

GATE = "model.layers.0.mlp.gate"
FUSED, ROWS = 6, 4


def fused_first(layers: int = 1) -> tuple[Any, Callable[[], None]]:
    """A model whose first block is fused, and what has its experts called as a module."""
    model, called = tiny_olmoe(layers=layers), [False]

    def block(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        _, weights, index = self.gate(tokens)
        experts = self.experts if called[0] else self.experts.forward
        return experts(tokens, index, weights).view_as(hidden)

    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(block, mlp)
    return model, lambda: called.__setitem__(0, True)


def run(model: Any, count: int, rows: int = ROWS) -> None:
    with torch.no_grad():
        for seed in range(count):
            model(**token_batch(1, rows, seed=seed), use_cache=False)


def lost_rows(routes: RecordedRoutes, layer: int = 0) -> list[bool]:
    assert routes.lost_layers is not None
    lost = routes.lost_layers[:, layer]
    assert (routes.expert_ids[lost, layer] == routes.no_expert).all()
    assert (routes.expert_ids[~lost, layer] != routes.no_expert).all()
    return lost.tolist()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_routes_and_samples_say_the_same_of_them(layers: int, asked: bool) -> None:
    model, call_experts = fused_first(layers)
    with moe_trace.MoETracer(model, routes=True) as tracer:
        run(model, FUSED)
        if asked:  # rows of theirs are made already
            assert len(tracer.routes()) == FUSED * ROWS and tracer.routes().lost_layers is None
        call_experts()
        with watch_experts(model) as calls:
            run(model, 1)
    routes, samples = tracer.routes(), tracer.samples()
    assert tracer.recording().lost.calls == {GATE: {"unjoined": FUSED}}
    assert lost_rows(routes) == [True] * FUSED * ROWS + [False] * ROWS and not routes.dropped
    assert (routes.expert_ids[-ROWS:, 0] == calls[0].index).all()
    assert not any(lost_rows(routes, layer) != [False] * len(routes) for layer in range(1, layers))
    total = np.zeros((layers, 8), int)
    for sample in samples:
        total[sample.layer] += sample.assignments
    assert routes.assignments().tolist() == total.tolist()


def test_rows_that_stand_in_a_file_stay_and_are_told(tmp_path: Path) -> None:
    model, call_experts = fused_first(2)
    with moe_trace.MoETracer(model, routes=Routes(path=tmp_path / "a.routes.npz")) as tracer:
        run(model, 2)
        assert len(tracer.routes()) == 2 * ROWS  # which writes them
        run(model, FUSED - 2)
        call_experts()
        run(model, 1)
        with pytest.warns(RuntimeWarning, match=rf"{GATE}: .* 2 of those were written to .*a\.routes\.npz"):
            routes = tracer.routes()
    assert lost_rows(routes) == [False] * 2 * ROWS + [True] * (FUSED - 2) * ROWS + [False] * ROWS
    assert len([s for s in tracer.samples() if s.layer == 0]) == 1
    assert lost_rows(moe_trace.read_routes(tmp_path / "a.routes.npz")) == lost_rows(routes)


def test_calls_in_compiled_code_have_numbers_of_their_own() -> None:
    model, call_experts = fused_first()
    torch._dynamo.reset()
    with moe_trace.MoETracer(model, routes=True) as tracer:
        run(model, FUSED)
        call_experts()
        run(model, 1)
        model.compile(backend="eager")
        run(model, FUSED)
    assert len(tracer.samples()) == 1 + FUSED
    assert tracer.recording().lost.calls == {GATE: {"unjoined": FUSED}}
    assert lost_rows(tracer.routes()) == [True] * FUSED * ROWS + [False] * (1 + FUSED) * ROWS


def test_many_calls_are_kept_as_the_runs_that_they_form() -> None:
    refusals, gate = Refusals(), "gate"
    refusals.taken_back.add(gate, range(0, 0))
    refusals.taken_back.add(gate, range(10**5))
    for call in range(10**5, 10**5 + 1000):  # as experts without a router take them back
        refusals.taken_back.add(gate, range(call, call + 1))
    assert refusals.taken_back.runs == {gate: [range(10**5 + 1000)]}
    model, call_experts = fused_first()
    with moe_trace.MoETracer(model) as tracer:
        run(model, 50)
        call_experts()
        run(model, 1)
        for _ in range(2):
            assert len(tracer.samples()) == 1
    refusals = tracer._recorder.refusals
    assert refusals.taken_back.runs == {GATE: [range(50)]}
    assert refusals._calls.runs == {(GATE, False): [range(50)]}  # once they were counted
    assert tracer.recording().lost.calls == {GATE: {"unjoined": 50}}


@pytest.mark.parametrize("seed", range(20))
def test_numbers_of_calls_are_a_set(seed: int) -> None:
    drawn, sets = random.Random(seed), [set[int](), set[int]()]
    numbers = [CallNumbers(), CallNumbers()]
    for _ in range(60):
        which, start = drawn.randrange(2), drawn.randrange(200)
        calls = range(start, start + drawn.choice([0, 1, 1, 2, 9]))
        numbers[which].add("gate", calls)
        sets[which].update(calls)
    for own, known in zip(numbers, sets, strict=True):
        assert {call for call in range(-1, 220) if own.has("gate", call)} == known
        runs = own.runs["gate"]
        assert all(one.stop < two.start for one, two in pairwise(runs))
        assert not own.has("other", 3)
    assert numbers[0].shared(numbers[1]) == {"gate": len(sets[0] & sets[1])}
    assert numbers[0].shared(CallNumbers()) == {}
