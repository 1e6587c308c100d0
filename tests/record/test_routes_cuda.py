"""Tests of routes on a GPU: equal to what the experts received, token by token, without synchronisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moe_trace
from graph_models import WAYS, capture, gpu_model, ids, run
from models import ExpertsCall, tiny_olmoe, token_batch, watch_compiled_experts, watch_experts
from moe_trace import Routes

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("fresh_compiler")]


def received(calls: list[ExpertsCall], layers: int) -> np.ndarray:
    return np.stack([np.concatenate([c.index for c in calls if c.layer == i]) for i in range(layers)], 1)


@pytest.mark.parametrize("experts", [8, 300])
def test_ids_and_identity_of_a_generation(experts: int) -> None:
    model = tiny_olmoe(experts=experts, hidden_size=64, intermediate_size=32).to("cuda", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    batch = {name: value.cuda() for name, value in token_batch(2, 5).items()}
    batch["attention_mask"][1, :2] = 0
    with watch_experts(model) as calls, moe_trace.MoETracer(model, routes=Routes(token_ids=True)) as tracer:
        model.generate(**batch, max_new_tokens=40, do_sample=False)
    routes = tracer.routes()
    assert routes.expert_ids.dtype == (np.uint8 if experts == 8 else np.uint16)
    assert (routes.expert_ids == received(calls, 3)).all()
    assert routes.position[:14].tolist() == [0, 1, 2, 3, 4, -1, -1, 0, 1, 2, 5, 3, 6, 4]
    assert routes.sequence[10:].tolist() == [0, 1] * ((len(routes) - 10) // 2)
    assert routes.token_ids is not None
    assert routes.token_ids[:10].tolist() == batch["input_ids"].flatten().tolist()


def test_nothing_waits_while_routes_are_recorded_and_copied() -> None:
    model = tiny_olmoe(hidden_size=64, intermediate_size=32).to("cuda", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    batch = {"input_ids": token_batch(8, 128)["input_ids"].cuda()}  # transformers waits to look into a mask

    @torch.no_grad()
    def steps(count: int) -> None:
        for _ in range(count):
            model(**batch)  # without a cache, transformers waits to look for packed sequences

    steps(2)
    with moe_trace.MoETracer(model, routes=Routes(weights=True, token_ids=True)) as tracer:
        steps(40)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps(400)  # 18 KB a forward of ids and weights: copied twice and more
        finally:
            torch.cuda.set_sync_debug_mode("default")
    routes = tracer.routes()
    assert len(routes) == 440 * 1024 and routes.dropped == {}
    assert (routes.expert_ids[-1024:] == routes.expert_ids[:1024]).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (4, 64)])
@torch.no_grad()
def test_reduce_overhead_records_each_token(way: str, shape: tuple[int, int]) -> None:
    tokens, model, expected = shape[0] * shape[1], gpu_model(), []
    with (
        watch_compiled_experts(model, tokens) as buffers,
        moe_trace.MoETracer(model, routes=True) as tracer,
    ):
        forward = WAYS[way](model, mode="reduce-overhead", fullgraph=True)
        for seed in range(8):
            run(forward, ids(*shape, seed=seed))
            expected.append(torch.stack(buffers, 1).cpu().numpy())
    routes = tracer.routes()
    assert (routes.expert_ids == np.concatenate(expected)).all()
    assert routes.dropped == {}


@torch.no_grad()
def test_a_captured_graph_records_each_token_of_each_replay() -> None:
    model, static = gpu_model(), ids(2, 8, seed=0)
    inputs = [ids(2, 8, seed=seed) for seed in range(6)]
    with moe_trace.MoETracer(model, routes=True) as tracer:
        graph = capture(model, static)
        for tokens in inputs:
            static.copy_(tokens)
            graph.replay()
        torch.cuda.synchronize()
    routes, eager = tracer.routes(), gpu_model()
    with watch_experts(eager) as calls:
        for tokens in inputs:
            eager(tokens, use_cache=False)
    replayed: Any = routes.expert_ids[-6 * 16 :]
    assert (replayed == received(calls, replayed.shape[1])).all()


@torch.no_grad()
def test_a_static_cache_generation_records_each_token() -> None:
    model = gpu_model()
    batch = {name: value.cuda() for name, value in token_batch(2, 8).items()}
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with moe_trace.MoETracer(model, routes=True) as tracer:
        model.generate(**batch, **options, cache_implementation="static")
    routes = tracer.routes()
    total = {name: 0 for name in routes.layers}
    for sample in tracer.samples():
        total[sample.name] = total[sample.name] + sample.assignments
    assert [counts.tolist() for counts in total.values()] == routes.assignments().tolist()
    assert len(routes) == 2 * 8 + 2 * 7
