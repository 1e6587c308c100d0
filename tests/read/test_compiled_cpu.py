"""Tests of phases of compiled code on a CPU, against operators and kernels of the trace assigned by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor import config

import moe_trace
from compiled_models import WAYS, compiled_anew, small_model
from models import token_batch
from moe_trace import read_summary
from moe_trace.data.compiled_graph import CompiledGraph, CompiledLaunch
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.file.trace_file import read_trace
from moe_trace.read.time.call_times import measure_all
from moe_trace.read.time.phase_detection import COMBINE, DISPATCH, EXPERTS, ROUTER
from moe_trace.read.time.phases import CallTimes
from moe_trace.timeline.correlate.compiled_launches import Stretch, match_operators

STEPS, LAYERS = 3, 2
Event = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The trace of a compiled model, made once for each way."""

    @cache
    def of(way: str, *, train: bool = False) -> Path:
        path = tmp_path_factory.mktemp("cpu") / "trace.json"
        with config.patch({"cpp.enable_kernel_profile": True}), compiled_anew():
            _record(way, train, path)
        return path

    return of


def _record(way: str, train: bool, path: Path) -> None:
    model = small_model().train(train)

    def step(number: int) -> None:
        with torch.set_grad_enabled(train):
            logits = forward(**token_batch(1, 32, seed=number), use_cache=False).logits
            if train:
                logits.float().pow(2).mean().backward()

    torch._dynamo.reset()
    with moe_trace.MoETracer(model):
        forward = WAYS[way](model)
        step(0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
            for number in range(STEPS):
                step(number)
                prof.step()
        prof.export_chrome_trace(str(path))


def times_of(path: Path) -> CallTimes:
    trace = read_trace(path)
    return measure_all(trace.recording, trace.events, find_kernels(trace.events))


def calls_by_hand(path: Path) -> list[list[Event]]:
    """What stands right inside each call of a compiled graph, by a plain reading of the JSON."""
    slices = [e for e in json.loads(path.read_bytes())["traceEvents"] if e.get("cat") == "cpu_op"]
    slices.sort(key=lambda e: (e["ts"], -e["dur"]))
    found = []
    for call in [e for e in slices if e["name"].startswith("## Call CompiledFxGraph")]:
        inside: list[Event] = []
        for event in slices:
            within = call["ts"] <= event["ts"] and event["ts"] + event["dur"] <= call["ts"] + call["dur"]
            nested = inside and event["ts"] < inside[-1]["ts"] + inside[-1]["dur"]
            if event is not call and event["tid"] == call["tid"] and within and not nested:
                inside.append(event)
        found.append(inside)
    return found


def ns(events: list[Event]) -> int:
    return sum(round(1000 * event["dur"]) for event in events)


def named(calls: list[list[Event]], *parts: str) -> list[Event]:
    return [e for call in calls for e in call if any(part in e["name"] for part in parts)]


def is_activation(name: str) -> bool:
    return "_mul_silu" in name and "silu_backward" not in name


def products_beside(call: list[Event], at: int, step: int) -> list[Event]:
    """The grouped product there, or what it calls: written in Python, it shows no more since torch 2.14."""
    beside = itertools.takewhile(lambda e: "_cpp_" not in e["name"], call[at + step :: step])
    return list(itertools.takewhile(lambda e: e["name"] != "aten::cumsum", beside))


RUNS = {"model": ("model", False), "model, training": ("model", True), "layers, training": ("layers", True)}


@pytest.mark.parametrize("run", RUNS)
def test_routers_and_experts_are_those_found_by_hand(recorded: Callable[..., Path], run: str) -> None:
    way, train = RUNS[run]
    path = recorded(way, train=train)
    times, calls = times_of(path), calls_by_hand(path)
    assert times.coverage.compiled.joined == times.coverage.compiled.total == STEPS * LAYERS
    assert not times.on_device
    phases = times.forward.host_ns
    # A router is the product, the softmax and the top-k that follow each other.
    routers = [c[i - 2 : i + 1] for c in calls for i, e in enumerate(c) if e["name"] == "aten::topk"]
    assert len(routers) == STEPS * LAYERS and all(r[0]["name"] == "aten::mm" for r in routers)
    by_time = np.sort(phases[:, ROUTER])
    assert by_time.tolist() == sorted(ns(router) for router in routers)
    activations = [(c, i) for c in calls for i, e in enumerate(c) if is_activation(e["name"])]
    experts = [products_beside(c, i, step) for c, i in activations for step in (-1, 1)]
    assert len(experts) == 2 * STEPS * LAYERS and all(experts)
    assert phases[:, EXPERTS].sum() == sum(map(ns, experts)) + ns([c[i] for c, i in activations])
    assert (phases[:, [DISPATCH, COMBINE]] > 0).all()


@pytest.mark.parametrize("run", RUNS)
def test_phases_and_gap_are_the_block_and_no_more_than_the_wrapper_ran(
    recorded: Callable[..., Path], run: str
) -> None:
    way, train = RUNS[run]
    path = recorded(way, train=train)
    times = times_of(path)
    assert (times.forward.host_ns.sum(1) + times.host_gap_ns == times.block_host_ns).all()
    assert (times.host_gap_ns >= 0).all() and not times.forward.busy_ns.any()
    summary = read_summary(path)
    assert summary.phases is not None and summary.phases.whole.host_known
    assert summary.phases.provenance is not None and not summary.lost.untimed
    whole = summary.phases.whole
    assert whole.moe_work_us is not None and whole.model_work_us is not None
    # The model's work is that of the kernels and operators in the wrapper, and of those outside it.
    in_wrapper = ns([e for call in calls_by_hand(path) for e in call]) / 1000
    assert whole.moe_work_us < in_wrapper <= whole.model_work_us
    assert times.forward.host_ns.sum() < ns([e for call in calls_by_hand(path) for e in call])


@pytest.mark.parametrize("way", ["model", "layers"])
def test_a_training_step_has_the_phases_of_its_backward(recorded: Callable[..., Path], way: str) -> None:
    path = recorded(way, train=True)
    times, calls = times_of(path), calls_by_hand(path)
    assert times.backward is not None and times.backward.ran.all()
    assert len(times.samples) == STEPS * LAYERS
    backward = times.backward.host_ns
    products = named(calls, "::grouped_mm_fallback_backward")
    assert (backward[:, [ROUTER, DISPATCH, COMBINE]] > 0).all()
    if torch.__version__ < "2.14":  # since then it does not show
        assert products and ns(products) <= backward[:, EXPERTS].sum() < 1.2 * ns(products)


def test_without_ranges_of_the_kernels_it_says_which_setting_opens_them(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    raw = json.loads(recorded("model").read_bytes())
    raw["traceEvents"] = [e for e in raw["traceEvents"] if "_cpp_fused" not in e.get("name", "")]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(raw))
    assert times_of(path).coverage.compiled.joined == 0
    summary = read_summary(path)
    assert summary.phases is None
    assert "torch._inductor.config.cpp.enable_kernel_profile = True" in " ".join(summary.notes)


@pytest.mark.parametrize("change", ["another operator", "one fewer", "one more", "another kernel"])
def test_a_changed_call_is_unknown(recorded: Callable[..., Path], change: str, tmp_path: Path) -> None:
    raw = json.loads(recorded("model").read_bytes())
    last = calls_by_hand(recorded("model"))[-1]
    events = raw["traceEvents"]
    at = next(i for i, e in enumerate(events) if e.get("name") == "aten::topk" and e["ts"] == _ts(last))
    if change == "another operator":
        events[at]["name"] = "aten::sort"
    elif change == "one fewer":
        del events[at]
    elif change == "one more":
        events.insert(at, {**events[at], "ts": events[at]["ts"] - 0.5, "dur": 0.2})
    else:
        kernel = next(e for e in events if e.get("ts") == last[0]["ts"] and "cpp_fused" in e.get("name", ""))
        kernel["name"] += "_other"
    changed = tmp_path / "trace.json"
    changed.write_text(json.dumps(raw))
    times = times_of(changed)
    assert times.coverage.compiled.joined == (STEPS - 1) * LAYERS
    assert times.coverage.compiled.total == STEPS * LAYERS


def _ts(call: list[Event]) -> float:
    return next(e["ts"] for e in call if e["name"] == "aten::topk")


def test_a_trace_whose_calls_run_twice_the_kernels_is_not_joined(recorded: Callable[..., Path]) -> None:
    trace = read_trace(recorded("model"))
    graphs = trace.recording.compiled_graphs
    doubled = [replace(graph, launches=graph.launches * 2) for graph in graphs]
    bare = replace(trace.recording, compiled_graphs=tuple(doubled))
    times = measure_all(bare, trace.events, find_kernels(trace.events))
    assert times.coverage.compiled.joined == 0
    assert Counter(times.samples.in_graph.tolist())[True] == 0


@pytest.mark.parametrize(
    ("ran", "fit"),
    [
        (["aten::mm", "aten::topk", "cpp_0"], True),
        (["aten::mm", "aten::to", "aten::topk", "cpp_0"], False),
        (["aten::mm", "aten::sort", "cpp_0"], False),
        (["aten::topk", "aten::mm", "cpp_0"], False),
        (["aten::mm", "kernel", "cpp_0"], False),
        (["aten::mm", "aten::topk", "cpp_1"], False),
        (["aten::mm", "aten::topk", "aten::mm"], False),
        (["aten::mm", "aten::topk"], False),
        ([], False),
    ],
)
def test_each_launch_is_one_operator_with_its_name(ran: list[str], fit: bool) -> None:
    libraries = [
        CompiledLaunch(kernel=call, generated=False) for call in ("extern_kernels.bias_mm", "aten.topk_")
    ]
    graph = CompiledGraph(parts=(), launches=(*libraries, CompiledLaunch(kernel="cpp_0", generated=True)))
    found = [Stretch(range(i, i + 1), (i,)) for i in range(3)] if fit else None
    assert match_operators(ran, graph) == found
    assert match_operators(ran, replace(graph, problem="unknown")) is None


@pytest.mark.parametrize(
    ("called", "ran", "lengths"),
    [
        (["mine.one"], ["mine::one"], [1]),
        (["mine.one"], ["aten::zeros", "aten::mm"], [2]),
        (
            ["aten.mm", "mine.one", "aten.topk"],
            ["aten::mm", "aten::zeros", "aten::mm", "aten::topk"],
            [1, 2, 1],
        ),
        (["aten.mm", "mine.one"], ["aten::mm", "aten::mul"], [1, 1]),
        (["aten.mm", "mine.one"], ["aten::mm"], None),
        (["aten.mm", "mine.one"], ["aten::zeros", "aten::mm"], None),
        (["mine.one"], ["mine::one", "aten::mm"], None),  # where it shows, it shows alone
        (["mine.one", "mine.other"], ["aten::zeros", "aten::mm", "aten::mm"], None),
        (["aten.one"], ["aten::zeros", "aten::mm"], None),  # all of torch's own show
    ],
)
def test_an_operator_in_python_may_show_what_it_calls(
    called: list[str], ran: list[str], lengths: list[int] | None
) -> None:
    launches = [CompiledLaunch(kernel=f"torch.ops.{name}.default", generated=False) for name in called]
    found = match_operators(ran, CompiledGraph(parts=(), launches=tuple(launches)))
    assert (found and [len(one.kernels) for one in found]) == lengths
    assert not found or [one.launches for one in found] == [(i,) for i in range(len(called))]
