"""CUDA graphs on the timeline of a GPU: replays placed by count and enclosure, routers timed inside."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_trace
from graph_models import BOTH, WAYS, capture, gpu_model, ids, run
from moe_trace.data.schema import RoutingSample, Span
from moe_trace.read.check import check, read_checked

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("fresh_compiler")]


def work_in(events: list[Any], span: Span) -> list[Any]:
    """Kernels and copies of a stretch of the device's time."""
    return [
        e
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        and span.start_us - 1e-3 <= e["ts"]
        and e["ts"] + e["dur"] <= span.end_us + 1e-3
    ]


def launch_of(events: list[Any], sample: RoutingSample) -> Any:
    """The graph launch that a sample stands at, which its device span must be the kernels of."""
    assert sample.placement is not None
    host, device = sample.placement.host["graph"], sample.placement.device["graph"]
    (launch,) = [e for e in events if e["name"] == "cudaGraphLaunch" and e["ts"] == host.start_us]
    work = [
        e
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        and e["args"]["correlation"] == launch["args"]["correlation"]
    ]
    assert device.start_us == min(e["ts"] for e in work)
    assert device.end_us == pytest.approx(max(e["ts"] + e["dur"] for e in work), abs=2e-3)
    return launch


def broken(path: Path) -> dict[str, Any]:
    return {rule: found for rule, found in check(read_checked(path)).items() if found}


def router_kernels_of_an_eager_run(tmp_path: Path, static: torch.Tensor) -> list[int]:
    """How many kernels each layer's router launches, by what an eager profile of it says."""
    model, path = gpu_model(), tmp_path / "eager.json"
    model(static, use_cache=False)
    with moe_trace.profile(model, activities=BOTH) as prof:
        model(static, use_cache=False)
        torch.cuda.synchronize()
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_bytes())["traceEvents"]
    found = []
    for sample in prof.tracer.samples():
        assert sample.placement is not None
        found.append(len(work_in(events, sample.placement.device["router"])))
    return found


@torch.no_grad()
def test_replays_by_hand_are_placed_and_their_routers_timed(tmp_path: Path) -> None:
    model, static, path = gpu_model(), ids(2, 8, seed=0), tmp_path / "trace.json"
    with moe_trace.MoETracer(model) as tracer:
        graph = capture(model, static)
        for _ in range(3):
            graph.replay()  # before the trace
        with torch.profiler.profile(activities=BOTH) as prof:
            tracer.attach(prof)
            for replays in (1, 1, 3):
                for _ in range(replays):
                    graph.replay()
                prof.step()
            torch.cuda.synchronize()
        prof.export_chrome_trace(str(path))
    known = tracer.recording()
    assert known.lost.unplaced == {} and known.lost.untimed == {}, (
        known.lost,
        [(g.nodes, g.problem, len(g.calls)) for g in known.captured_graphs],
    )
    events = json.loads(path.read_bytes())["traceEvents"]
    samples = tracer.exported_samples
    launches = sorted(e["ts"] for e in events if e["name"] == "cudaGraphLaunch")
    assert [launch_of(events, s)["ts"] for s in samples if s.layer == 0] == launches
    assert [s.step for s in samples if s.layer == 0] == [0, 1, 2, 2, 2]
    expected = router_kernels_of_an_eager_run(tmp_path, static)
    for sample in samples:
        assert sample.placement is not None
        inside = work_in(events, sample.placement.device["router"])
        assert len(inside) == expected[sample.layer], [e["name"][:80] for e in inside]
        assert sample.placement.busy_us["router"] == pytest.approx(sum(e["dur"] for e in inside), abs=1e-2)
        assert sample.placement.device["experts"].start_us >= sample.placement.device["router"].end_us
    assert broken(path) == {}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_compiled_calls_are_placed(way: str, tmp_path: Path) -> None:
    """A whole model at its launch; layers of their own, which are two launches, each at its own."""
    model, tokens, path = gpu_model(), ids(1, 1, seed=0), tmp_path / "trace.json"
    with moe_trace.MoETracer(model) as tracer:
        forward = WAYS[way](model, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            run(forward, tokens)
        with torch.profiler.profile(activities=BOTH) as prof:
            tracer.attach(prof)
            for _ in range(3):
                run(forward, tokens)
                prof.step()
            torch.cuda.synchronize()
        prof.export_chrome_trace(str(path))
    assert tracer.recording().lost.unplaced == {}
    events = json.loads(path.read_bytes())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("moe.graph/")]
    assert len(ranges) == 3 and len(tracer.exported_samples) == 6
    launches = {}
    for sample in tracer.exported_samples:
        assert sample.placement is not None
        own, host = ranges[sample.step], sample.placement.host["graph"]
        assert own["ts"] <= host.start_us and host.end_us <= own["ts"] + own["dur"] + 1e-3
        launches[sample.step, sample.layer] = launch_of(events, sample)["ts"]
    for step in range(3):
        first, second = launches[step, 0], launches[step, 1]
        assert first == second if way == "model" else first < second
    assert broken(path) == {}


@torch.no_grad()
def test_graphed_callables_are_placed_at_their_own_launch(tmp_path: Path) -> None:
    model, tokens = gpu_model().requires_grad_(False), ids(2, 8, seed=0)
    path = tmp_path / "trace.json"
    with moe_trace.MoETracer(model) as tracer:
        model(tokens, use_cache=False)
        hidden = torch.randn(2, 8, 64, device="cuda", dtype=torch.bfloat16)
        for layer in model.model.layers:
            layer.mlp = torch.cuda.make_graphed_callables(layer.mlp, (hidden,))
        model(tokens, use_cache=False)
        with torch.profiler.profile(activities=BOTH) as prof:
            tracer.attach(prof)
            for _ in range(2):
                model(tokens, use_cache=False)
                prof.step()
            torch.cuda.synchronize()
        prof.export_chrome_trace(str(path))
    events = json.loads(path.read_bytes())["traceEvents"]
    placed = [s for s in tracer.exported_samples if s.in_graph]
    assert len(placed) == 4
    assert all(s.placement is not None for s in placed), tracer.recording().lost
    assert broken(path) == {}
    # Layers of one shape are captured as the same nodes, so the forward is all that can be told of them.
    ranges = {e["ts"] for e in events if e.get("cat") == "user_annotation" and "moe.graph/" in e["name"]}
    launches = {e["ts"] for e in events if e["name"] == "cudaGraphLaunch"}
    for sample in placed:
        assert sample.placement is not None
        assert sample.placement.host["graph"].start_us in ranges | launches


@torch.no_grad()
def test_annotated_graphs_are_told_by_the_ids_of_their_nodes(tmp_path: Path) -> None:
    if "enable_annotations" not in inspect.signature(torch.cuda.graph.__init__).parameters:
        pytest.skip("this torch has no annotations of graphs")
    from torch.cuda import _graph_annotations

    if _graph_annotations._is_tools_id_unavailable():
        pytest.skip("this driver, or cuda-bindings, has no ids of nodes")
    model, static, path = gpu_model(), ids(2, 8, seed=0), tmp_path / "trace.json"
    with moe_trace.MoETracer(model) as tracer:
        graph = capture(model, static, enable_annotations=True)
        with torch.profiler.profile(activities=BOTH) as prof:
            tracer.attach(prof)
            for _ in range(3):
                graph.replay()
                prof.step()
            torch.cuda.synchronize()
        prof.export_chrome_trace(str(path))
    assert set(tracer.recording().annotated_nodes) >= {"moe.router/L00", "moe.experts/L01"}
    samples = tracer.exported_samples
    assert len(samples) == 6 and all(s.placement and "router" in s.placement.device for s in samples)
    assert broken(path) == {}


@torch.no_grad()
def test_a_graph_outlives_its_tracer() -> None:
    """What it writes to is kept: nobody else may be given that memory while the graph can be replayed."""
    model, static = gpu_model(), ids(2, 8, seed=0)
    with moe_trace.MoETracer(model) as tracer:
        graph = capture(model, static)
        graph.replay()
    del tracer
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert all(bool((other == 7.0).all()) for other in others)
