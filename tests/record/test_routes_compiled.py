"""Routes inside torch.compile, token by token, against what the experts of an eager run received."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo

import moe_trace
from compiled_models import WAYS, compile_inner, run, small_model
from models import token_batch, watch_experts
from moe_trace import Routes
from moe_trace.record.graphs import ids_ring

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPES = [(1, 1), (1, 1), (2, 12), (3, 40), (1, 1), (2, 40)]  # copied raw in two sizes, and large


def eager_ids(shapes: list[tuple[int, int]], seed: int = 0) -> np.ndarray:
    """[T, L, K] in the order of the calls."""
    model, found = small_model(), []
    for i, (batch, length) in enumerate(shapes, start=seed):
        with torch.no_grad(), watch_experts(model) as calls:
            model(**token_batch(batch, length, seed=i), use_cache=False)
        found.append(np.stack([call.index for call in calls], 1))
    return np.concatenate(found)


@pytest.mark.parametrize("way", WAYS)
def test_ids_equal_those_of_the_eager_run(way: str) -> None:
    with moe_trace.MoETracer(model := small_model(), routes=Routes(weights=True)) as tracer:
        run(WAYS[way](model), SHAPES)
    routes = tracer.routes()
    assert (routes.expert_ids == eager_ids(SHAPES)).all()
    assert routes.dropped == {} and routes.lost_layers is None
    sums = np.zeros((2, 8), int)
    for sample in tracer.samples():
        sums[sample.layer] += sample.assignments
    assert routes.assignments().tolist() == sums.tolist()
    assert routes.weights is not None
    small = np.repeat([batch * length <= 64 for batch, length in SHAPES], [b * n for b, n in SHAPES])
    assert np.isfinite(routes.weights[small]).all()


def test_forwards_that_the_host_sees_have_their_identity() -> None:
    with moe_trace.MoETracer(model := small_model(), routes=Routes(token_ids=True)) as tracer:
        run(compile_inner(model), [(2, 12)])
    routes = tracer.routes()
    assert routes.sequence.tolist() == [0] * 12 + [1] * 12
    assert routes.position.tolist() == [*range(12)] * 2
    assert routes.token_ids is not None
    assert routes.token_ids.tolist() == token_batch(2, 12, seed=0)["input_ids"].flatten().tolist()


def test_what_a_ring_no_longer_holds_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_ring, "_SLOTS", 4)
    with moe_trace.MoETracer(model := small_model(), routes=True) as tracer:
        forward = torch.compile(lambda **batch: model(**batch).logits)
        run(forward, [(2, 40)] * 12)  # nothing tells the host of a step
        routes = tracer.routes()
    assert len(routes) + routes.dropped["in a graph"] == 12 * 80
    assert len(routes) >= 4 * 80 and routes.dropped["in a graph"] > 0
    assert (routes.expert_ids[-320:] == eager_ids([(2, 40)] * 4, seed=8)).all()


def test_rings_are_shipped_before_ids_are_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_ring, "_SLOTS", 4)
    with moe_trace.MoETracer(model := small_model(), routes=True) as tracer:
        run(compile_inner(model), [(2, 40)] * 12)
    routes = tracer.routes()
    assert (routes.expert_ids == eager_ids([(2, 40)] * 12)).all() and routes.dropped == {}


def test_a_static_cache_generation_that_is_compiled_equals_its_samples() -> None:
    model = small_model()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), watch_experts(model) as calls:
        model.generate(**token_batch(2, 8), **options)
    expected = np.stack(
        [np.concatenate([call.index for call in calls if call.layer == layer]) for layer in range(2)], 1
    )
    dynamo.reset()
    model = small_model()
    with moe_trace.MoETracer(model, routes=True) as tracer, torch.no_grad():
        forward = torch.compile(model.forward)
        model.forward = forward
        model.generate(**token_batch(2, 8), **options, cache_implementation="static")
    routes = tracer.routes()
    assert (routes.expert_ids == expected).all()
    assert len(routes) == 2 * 8 + 2 * 4
