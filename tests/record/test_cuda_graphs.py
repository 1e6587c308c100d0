"""Tests of CUDA graphs, by torch.compile and by hand: each replay is recorded, and graphs stay in use."""

from __future__ import annotations

import json
import logging
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_trace
from graph_models import BOTH, WAYS, capture, gpu_model, ids, run
from models import counted, tiny_olmoe, watch_compiled_experts, watch_experts

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("fresh_compiler")]

EXPERTS = 8


def eager_counts(inputs: list[torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> list[list[int]]:
    model = gpu_model(dtype)
    with torch.no_grad(), watch_experts(model) as calls:
        for tokens in inputs:
            model(tokens, use_cache=False)
    return [c.assignments(EXPERTS) for c in calls]


def counts(tracer: moe_trace.MoETracer) -> list[list[int]]:
    return [s.assignments.tolist() for s in sorted(tracer.samples(), key=lambda s: (s.call, s.layer))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (4, 64)])
@torch.no_grad()
def test_reduce_overhead_keeps_its_graphs_and_records_every_call(
    way: str, shape: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against what the experts of the same code receive: in bfloat16 Inductor rounds otherwise than eager."""
    inputs = [ids(*shape, seed=i) for i in range(8)]
    model, expected = gpu_model(), []
    with (
        caplog.at_level(logging.INFO, "torch._inductor"),
        watch_compiled_experts(model, shape[0] * shape[1]) as buffers,
        moe_trace.MoETracer(model) as tracer,
    ):
        forward = WAYS[way](model, mode="reduce-overhead", fullgraph=True)
        for tokens in inputs[:4]:
            run(forward, tokens)
            expected += counted(buffers, EXPERTS)
        with torch.profiler.profile(activities=BOTH) as prof:
            for tokens in inputs[4:]:
                run(forward, tokens)
                expected += counted(buffers, EXPERTS)
            torch.cuda.synchronize()
    found = counts(tracer)
    different = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    assert found == expected, f"calls {different} (layer = call % 2) of {shape}: {found} != {expected}"
    assert not [r for r in caplog.records if "skipping cudagraphs" in r.getMessage().lower()]
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    launches = [e for e in json.loads(path.read_bytes())["traceEvents"] if e["name"] == "cudaGraphLaunch"]
    assert len(launches) == 4 * (1 if way == "model" else 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 64)])
@torch.no_grad()
def test_reduce_overhead_in_float32_equals_the_eager_run(way: str, shape: tuple[int, int]) -> None:
    """In single precision a rounding does not change a choice, so that the eager run is the truth too."""
    inputs = [ids(*shape, seed=i) for i in range(6)]
    model = gpu_model(torch.float32)
    with moe_trace.MoETracer(model) as tracer:
        forward = WAYS[way](model, mode="reduce-overhead", fullgraph=True)
        for tokens in inputs:
            run(forward, tokens)
    found, expected = counts(tracer), eager_counts(inputs, torch.float32)
    different = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    assert found == expected, f"calls {different} (layer = call % 2) of {shape}: {found} != {expected}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 64)])
@torch.no_grad()
def test_the_next_tracer_records_replays_of_the_same_graphs(
    way: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Captured once: replays under a tracer are its own, those between two tracers are nobody's."""
    model, forward = gpu_model(torch.float32), None
    expected = []
    for number in range(3):
        inputs = [ids(*shape, seed=10 * number + i) for i in range(5)]
        with moe_trace.MoETracer(model) as tracer:
            if forward is None:
                forward = WAYS[way](model, mode="reduce-overhead", fullgraph=True)
            for tokens in inputs:
                run(forward, tokens)
        expected.append(eager_counts(inputs, torch.float32))
        assert counts(tracer) == expected[-1], number
        lost = tracer.recording().lost
        assert lost.overwritten == lost.silent_forwards == 0
        with torch.profiler.profile(activities=BOTH) as prof:
            for i in range(3 * 64):  # more than a ring holds
                run(forward, ids(*shape, seed=500 + i))
            torch.cuda.synchronize()
        path = tmp_path / f"{number}.json"
        prof.export_chrome_trace(str(path))
        names = [e["name"] for e in json.loads(path.read_bytes())["traceEvents"]]
        assert names.count("cudaGraphLaunch") == 3 * 64 * (1 if way == "model" else 2)
        assert not [n for n in names if n.startswith("moe.")]
        assert counts(tracer) == expected[-1]


@torch.no_grad()
def test_compiled_decode_adds_no_synchronisation() -> None:
    model = gpu_model()
    tokens = ids(1, 1, seed=0)
    with moe_trace.MoETracer(model) as tracer:
        forward = torch.compile(model, mode="reduce-overhead")
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            forward(tokens, use_cache=False)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2 * tracer._graphs.rings.slots):  # more than one shipment
                torch.compiler.cudagraph_mark_step_begin()
                forward(tokens, use_cache=False)
                tracer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        slots = tracer._graphs.rings.slots
    assert len(tracer.samples()) == 2 * (5 + 2 * slots)


def replay(graph: torch.cuda.CUDAGraph, static: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Of each input, which is copied to where the graph reads it."""
    for tokens in inputs:
        static.copy_(tokens)
        graph.replay()
    torch.cuda.synchronize()


@torch.no_grad()
def test_a_captured_graph_records_every_replay() -> None:
    model = gpu_model()
    static = ids(2, 8, seed=0)
    inputs = [ids(2, 8, seed=i) for i in range(6)]
    with moe_trace.MoETracer(model) as tracer:
        graph = capture(model, static)
        replay(graph, static, inputs)
    warm_up = eager_counts([inputs[0]] * 2)
    assert counts(tracer) == warm_up + eager_counts(inputs)
    assert [s.in_graph for s in tracer.samples() if s.layer == 0] == [False] * 2 + [True] * 6


@torch.no_grad()
def test_make_graphed_callables_records_every_replay() -> None:
    """Torch refuses modules with hooks of their own: the MoE block has none once a forward was recorded."""
    model = gpu_model().requires_grad_(False)
    inputs = [ids(2, 8, seed=i) for i in range(4)]
    with moe_trace.MoETracer(model) as tracer:
        model(inputs[0], use_cache=False)
        sample = torch.randn(2, 8, 64, device="cuda", dtype=torch.bfloat16)
        for layer in model.model.layers:
            layer.mlp = torch.cuda.make_graphed_callables(layer.mlp, (sample,))
        for tokens in inputs:
            model(tokens, use_cache=False)
        torch.cuda.synchronize()
    replays = [s for s in tracer.samples() if s.in_graph]
    found = [s.assignments.tolist() for s in sorted(replays, key=lambda s: (s.call, s.layer))]
    assert found == eager_counts(inputs)


def test_peak_memory_of_a_training_step_is_within_one_percent() -> None:
    torch.manual_seed(0)
    model = tiny_olmoe(layers=4, experts=16, hidden_size=512, intermediate_size=1024, vocab_size=8192)
    model = model.to("cuda", torch.bfloat16).train()
    model.set_experts_implementation("grouped_mm")
    tokens = torch.randint(3, 8192, (8, 256), device="cuda")

    def peak() -> int:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    bare = peak()
    with moe_trace.MoETracer(model):
        traced = peak()
    assert traced <= 1.01 * bare


@torch.no_grad()
def test_calls_on_another_stream_are_true() -> None:
    model = gpu_model()
    inputs = [ids(4, 32, seed=i) for i in range(20)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with moe_trace.MoETracer(model) as tracer, warnings.catch_warnings():
        for i, tokens in enumerate(inputs):
            streams[i % 2].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(streams[i % 2]):
                model(tokens, use_cache=False)
        torch.cuda.synchronize()
    assert counts(tracer) == eager_counts(inputs)


def fuse(model: Any) -> None:
    """Its experts are not called as modules."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        _, weights, index = self.gate(tokens)
        return self.experts.forward(tokens, index, weights).view_as(hidden)  # type: ignore[no-any-return]

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)


@torch.no_grad()
def test_fused_blocks_in_a_captured_graph_are_recorded() -> None:
    model = gpu_model()
    fuse(model)
    static, inputs = ids(2, 8, seed=0), [ids(2, 8, seed=i) for i in range(6)]
    with moe_trace.MoETracer(model) as tracer:
        graph = capture(model, static)
        replay(graph, static, inputs)
    assert counts(tracer) == eager_counts([inputs[0]] * 2) + eager_counts(inputs)
    assert not tracer.recording().lost.calls


@torch.no_grad()
def test_another_thread_runs_eagerly_while_a_graph_is_captured() -> None:
    model = gpu_model()
    static, inputs, meanwhile = ids(2, 8, seed=0), [ids(2, 8, seed=i) for i in range(6)], ids(4, 16, seed=77)

    def run_eagerly() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            model(meanwhile, use_cache=False)

    def go(module: Any, args: Any) -> None:
        if threading.current_thread() is threading.main_thread() and torch.cuda.is_current_stream_capturing():
            pool.submit(run_eagerly).result()

    with ThreadPoolExecutor(1) as pool, moe_trace.MoETracer(model) as tracer:
        pool.submit(run_eagerly).result()
        model.model.layers[0].mlp.experts.register_forward_pre_hook(go)
        graph = capture(model, static, capture_error_mode="thread_local")
        replay(graph, static, inputs)
    samples = sorted(tracer.samples(), key=lambda s: (s.call, s.layer))
    replayed = [s.assignments.tolist() for s in samples if s.in_graph]
    eager = [s.assignments.tolist() for s in samples if not s.in_graph]
    assert replayed == eager_counts(inputs)
    assert sorted(eager) == sorted(eager_counts([meanwhile] * 2 + [inputs[0]] * 2))
    assert not tracer.recording().lost.calls


@torch.no_grad()
def test_a_block_captured_alone_after_the_model_was_moved_to_the_gpu() -> None:
    model = tiny_olmoe(layers=2, hidden_size=64, intermediate_size=32)
    model.set_experts_implementation("batched_mm")
    block = model.model.layers[0].mlp
    with moe_trace.MoETracer(model) as tracer:
        with watch_experts(model) as calls:
            for seed in range(8):
                model(ids(2, 8, seed=seed).cpu(), use_cache=False)
            model.cuda()
            static = torch.randn(2, 8, 64, device="cuda")
            with torch.cuda.stream(torch.cuda.Stream()):
                block(static)
            torch.cuda.synchronize()
        expected = [c.assignments(EXPERTS) for c in calls]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            block(static)
        graph.replay()
        torch.cuda.synchronize()
    samples = tracer.samples()
    assert [s.assignments.tolist() for s in samples if not s.in_graph] == expected
    # All that a graph writes outside any forward of the model belongs to the one before.
    assert [s.assignments.tolist() for s in samples if s.in_graph] == [expected[-1]]
    assert not tracer.recording().lost.calls
