"""Tests of phases in compiled code, on real H100 traces with kernels assigned by hand, and altered traces."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import ask, merge_into, read_summary
from moe_trace.data.codec import decode_recording, encode_recording
from moe_trace.data.compiled_graph import (
    BY_COMPILER,
    CompiledGraph,
    CompiledLaunch,
    LaunchPart,
    decode_compiled,
    encode_compiled,
)
from moe_trace.data.trace_json.events import spans_ns
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.diff import compare
from moe_trace.read.file.trace_file import read_trace
from moe_trace.read.time.call_times import measure_all
from moe_trace.read.time.phase_detection import COMBINE, DISPATCH, EXPERTS, ROUTER
from moe_trace.read.time.phases import CallTimes
from moe_trace.read.time.step_timeline import find_lanes
from moe_trace.show.figures.time import latency, time_figures
from moe_trace.show.json import to_plain
from moe_trace.show.text.report import render_text
from moe_trace.timeline.correlate.compiled_calls import CompiledCalls
from moe_trace.timeline.correlate.compiled_launches import (
    is_consistent,
    match_launches,
    part_of,
    split,
    usual_sequences,
)
from moe_trace.timeline.merge import merge_recording
from paths import ROOT

FOLDER = ROOT / "tests" / "data" / "h100_compiled"
PARTS = ["compiled_experts", "compiled_router"]
"""Only these are compiled; the rest of the block runs as written."""
ALL = sorted({file.name.split(".")[0] for file in FOLDER.iterdir()} - {*PARTS, "by_hand"})
TRAINING = ["compiled_training", "training_layers", "training_with_graphs"]
ONE_BY_ONE = ["without_graphs", "layers_without_graphs", "compiled_training"]
GROUPED = ("prepare_grouped_gemm_data", "enable_3x_kernel_for_sm9xINS_4gemm6kernel13Gemm")


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.pt.trace.json.gz"


@cache
def times_of(name: str) -> CallTimes:
    trace = read_trace(path_of(name))
    return measure_all(trace.recording, trace.events, find_kernels(trace.events))


@cache
def kernels_of(name: str) -> list[list[dict[str, Any]]]:
    """Kernels, copies and memsets of each forward's compiled calls, by a plain reading of the JSON."""
    events = json.loads(gzip.decompress(path_of(name).read_bytes()))["traceEvents"]
    slices = [e for e in events if e.get("ph") == "X"]
    threads = {e["tid"] for e in slices if e["name"].startswith("moe.graph/")}
    threads = threads or {e["tid"] for e in slices if e["name"].startswith("cudaGraphLaunch")}
    calls = [e for e in slices if e["name"].startswith("## Call Compiled") and e["tid"] in threads]
    launches = [e for e in slices if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    work = defaultdict(list)
    for event in slices:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            work[event["args"]["correlation"]].append(event)
    found = []
    for call in sorted(calls, key=lambda e: e["ts"]):
        inside = [
            event
            for launch in launches
            if launch["tid"] == call["tid"] and call["ts"] <= launch["ts"] <= call["ts"] + call["dur"]
            for event in work[launch["args"].get("correlation")]
        ]
        found.append(sorted(inside, key=lambda e: e["ts"]))
    return found


def test_every_way_of_compiling_tells_all_phases_of_all_calls() -> None:
    assert len(ALL) == 10
    for name in ALL:
        times, calls = times_of(name), 48 if name.endswith("16_layers") else 6
        assert times.coverage.compiled.joined == times.coverage.compiled.total == calls, name
        assert (times.forward.busy_ns[:, [ROUTER, DISPATCH, EXPERTS, COMBINE]] > 0).all(), name
        assert not times.forward.busy_ns[:, COMBINE + 1 :].any(), name
        assert times.forward.kernels[:, ROUTER].tolist() == [4] * calls, name  # product, softmax, topk: 2


@pytest.mark.parametrize("name", ALL)
def test_experts_take_what_their_products_take_by_hand(name: str) -> None:
    times = times_of(name)
    by_hand = [e for call in kernels_of(name) for e in call if any(part in e["name"] for part in GROUPED)]
    products = sum(round(1000 * e["dur"]) for e in by_hand)
    assert products > 0
    # 3 %: the activation stands between the products, and is the experts' too.
    assert times.forward.busy_ns[:, EXPERTS].sum() == pytest.approx(products, rel=0.03)


@pytest.mark.parametrize("name", [n for n in ALL if n not in TRAINING])
def test_routers_are_the_same_kernels_in_every_layer_and_replay(name: str) -> None:
    topk = [e for call in kernels_of(name) for e in call if "topk" in e["name"].lower()]
    assert len(topk) == len(times_of(name).samples)
    times = times_of(name)
    assert times.forward.busy_ns[:, ROUTER].min() > min(round(1000 * e["dur"]) for e in topk)
    busy = times.forward.busy_ns.sum(1)
    assert busy.max() < 1.15 * busy.min()


@pytest.mark.parametrize("name", ALL)
def test_phases_gaps_and_overlap_add_up_to_the_span(name: str) -> None:
    times = times_of(name)
    busy = times.forward.busy_ns.sum(1)
    assert (busy + times.device_gap_ns - times.device_overlap_ns == times.device_span_ns).all()
    assert (times.device_gap_ns >= 0).all()
    total = sum(round(1000 * e["dur"]) for call in kernels_of(name) for e in call)
    assert 0 < busy.sum() < total


@pytest.mark.parametrize("name", TRAINING)
def test_a_backward_takes_about_twice_its_forward(name: str) -> None:
    times = times_of(name)
    assert times.backward is not None and times.backward.ran.all()
    ratio = times.backward.busy_ns[:, EXPERTS].sum() / times.forward.busy_ns[:, EXPERTS].sum()
    assert 1.8 < ratio < 2.4
    # The gradient of the gather stands before the late products that give the weights' gradients.
    assert (times.backward.busy_ns[:, [ROUTER, DISPATCH, COMBINE]] > 0).all()


def test_routers_have_the_kernels_that_a_graph_captured_by_hand_names() -> None:
    """The same forward, captured from eager code, whose routers CUDA's driver told by their nodes."""
    trace = read_trace(path_of("by_hand"))
    kernels, names = find_kernels(trace.events), trace.events.names
    spans = spans_ns(trace.recording.calls.places.span("device", "router"))
    eager = [
        [names[n] for n in kernels.name[(start <= kernels.start_ns) & (kernels.start_ns < end)]]
        for start, end in spans
    ]
    trace = read_trace(path_of("without_graphs"))
    kernels, names, calls = find_kernels(trace.events), trace.events.names, trace.recording.calls
    rows = np.arange(len(calls))
    join = CompiledCalls(calls, rows, trace.recording.compiled_graphs, trace.events, kernels)
    compiled: list[list[str]] = [[] for _ in rows]
    for one in join.forward():
        if one.place == "router":
            compiled[one.call].append(names[kernels.name[one.kernel]])
    for by_hand, found in zip(eager, compiled, strict=True):
        product, softmax, *topk = found
        assert product == by_hand[0] and product.startswith("nvjet")
        assert "softmax" in softmax and "softmax_warp_forward" in by_hand[2]
        assert topk == by_hand[3:5] and "gatherTopK" in topk[0]


@pytest.mark.parametrize("name", PARTS)
def test_what_is_compiled_alone_has_the_phases_of_the_whole(name: str) -> None:
    times, whole = times_of(name), times_of("without_graphs")
    busy, expected = times.forward.busy_ns.sum(0), whole.forward.busy_ns.sum(0)
    alone = {"compiled_experts": [DISPATCH, EXPERTS, COMBINE], "compiled_router": [ROUTER]}[name]
    assert busy[alone] == pytest.approx(expected[alone], rel=0.06)
    assert (times.forward.busy_ns[:, [ROUTER, DISPATCH, EXPERTS, COMBINE]] > 0).all()


@pytest.mark.parametrize("name", ["compiled_model", "without_graphs"])
def test_the_report_gives_routers_their_time_and_says_where_it_is_from(name: str) -> None:
    summary = read_summary(path_of(name))
    assert len(summary.busy_us) == 6 and all(us > 0 for us in summary.busy_us.values())
    notes = " ".join(summary.notes)
    assert "the compiler's provenance" in notes and "no router latency" not in notes
    assert "6 a time of the router itself" in notes


@pytest.mark.parametrize("name", ALL)
def test_the_host_times_of_compiled_code_are_unknown_and_not_zero(name: str) -> None:
    summary = read_summary(path_of(name))
    assert summary.phases is not None
    whole = summary.phases.whole
    assert not whole.host_known and whole.moe_share_of_step is None and whole.moe_share_of_model is not None
    assert not any("host" in figure.key for figure in time_figures(summary))


def test_layers_that_share_code_have_lanes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(path_of("compiled_layers").read_bytes())
    merge_into(path, read_trace(path).recording)
    calls = read_trace(path).recording.calls
    topk_us = [
        e["dur"] for call in kernels_of("compiled_layers") for e in call if "topk" in e["name"].lower()
    ]
    spans = calls.places.span("device", "router")
    assert len(topk_us) == len(spans) == 6 and (spans[:, 1] > min(topk_us)).all()
    # In order of time the runs are the layers', in their order.
    assert calls.layer[np.argsort(spans[:, 0])].tolist() == [0, 1] * 3
    experts = calls.places.span("device", "experts")
    assert (experts[:, 0] >= spans.sum(1) - 0.001).all()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    marked = [e for e in events if e.get("args", {}).get("router and experts") == BY_COMPILER]
    assert sorted(e["args"]["router"] for e in marked) == sorted(calls.name.tolist())
    times = measure_all(read_trace(path).recording, *_events_and_kernels(path))
    assert (times.forward.busy_ns == times_of("compiled_layers").forward.busy_ns).all()


def test_a_forward_with_one_run_fewer_than_layers_has_no_lanes() -> None:
    trace = read_trace(path_of("compiled_layers"))
    graphs = trace.recording.compiled_graphs
    part = graphs[0].parts[0]
    assert part.router(0, 2, set(part.routers)) == part.routers[0]
    assert part.router(0, 1, set(part.routers)) is None
    assert part.router(0, 1, set(part.routers[1:])) == part.routers[1]


def _events_and_kernels(path: Path) -> tuple[Any, Any]:
    events = read_trace(path).events
    return events, find_kernels(events)


@pytest.mark.parametrize("name", ALL)
def test_every_answer_says_whence_its_times_are(name: str) -> None:
    summary = read_summary(path_of(name))
    assert summary.phases is not None and summary.phases.provenance is not None
    assert summary.phases.provenance.unknown_share == 0 <= summary.phases.provenance.shared_share < 0.05
    text = render_text(summary)
    assert " ".join(text.split()).count(BY_COMPILER) >= 4
    plain = json.loads(json.dumps(to_plain(summary)))
    assert set(plain["phases"]["provenance"]) == {"unknown_share", "shared_share"}
    phases = [f for f in time_figures(summary) if f.key.startswith(("forward", "backward"))]
    assert phases and all(BY_COMPILER in figure.caption for figure in phases)
    assert all(BY_COMPILER in f.sentence for f in summary.findings if f.severity == "time")
    (answer,) = ask(summary, questions=["share"])
    assert BY_COMPILER in answer.sentence and "by_the_compilers_provenance" in answer.figures
    lanes = find_lanes(summary.samples, *_events_and_graphs(path_of(name)))
    assert len(lanes.samples) == len(summary.samples) and lanes.clocks()[0] == "device"
    assert set(lanes.device.phase.tolist()) == {ROUTER, DISPATCH, EXPERTS, COMBINE}


def test_a_routers_latency_on_a_cpu_says_whence_it_is() -> None:
    summary = read_summary(FOLDER.with_name("cpu_compiled") / "without_graphs.pt.trace.json.gz")
    assert all(router.latency.host is not None for router in summary.routers)
    assert BY_COMPILER in latency(summary).caption
    table = next(part for part in render_text(summary).split("\n\n") if part.startswith("Routers ("))
    assert f"call, inside compiled code {BY_COMPILER}: host p50" in " ".join(table.split())


def test_a_difference_of_eager_and_compiled_code_says_whence_the_times_are() -> None:
    eager = ROOT / "tests" / "data" / "h100" / "prefill_all_options.pt.trace.json.gz"
    found = compare(read_summary(eager), read_summary(path_of("compiled_model")))
    told = {change.fact: (change.a, change.b) for change in found.setup}
    assert told["phases told"] == ("by ranges", "by the compiler")
    assert [note for note in found.notes if BY_COMPILER in note]


def _events_and_graphs(path: Path) -> tuple[Any, Any]:
    trace = read_trace(path)
    return trace.events, trace.recording.compiled_graphs


def test_without_the_compilers_notes_nothing_is_claimed() -> None:
    trace = read_trace(path_of("compiled_model"))
    bare = replace(trace.recording, compiled_graphs=())
    assert len(measure_all(bare, trace.events, find_kernels(trace.events)).samples) == 0


def test_two_models_with_the_same_code_in_one_trace_are_told_apart(tmp_path: Path) -> None:
    recording = read_trace(path_of("compiled_model")).recording
    idle = replace(recording, samples=recording.calls.take(np.arange(0)))
    copy = tmp_path / "trace.json.gz"
    copy.write_bytes(path_of("compiled_model").read_bytes())
    merge_recording(copy, [idle, recording])
    trace = read_trace(copy)
    found = measure_all(trace.recording, trace.events, find_kernels(trace.events))
    assert set(found.samples.name) == {f"model1.model.layers.{layer}.mlp.gate" for layer in (0, 1)}
    assert (found.forward.busy_ns == times_of("compiled_model").forward.busy_ns).all()
    assert not {g.parts for g in trace.recording.compiled_graphs} & {
        g.parts for g in recording.compiled_graphs
    }


# -- the list of launches -----------------------------------------------------------------------------


@cache
def graph_and_names(name: str) -> tuple[CompiledGraph, tuple[tuple[str, ...], ...]]:
    graphs = [g for g in read_trace(path_of(name)).recording.compiled_graphs if not g.backward]
    calls = [tuple(e["name"] for e in call) for call in kernels_of(name)]
    first = graphs[0].launches[0].kernel
    return graphs[0], tuple(call[call.index(first) :] for call in calls)


def labels(names: tuple[str, ...], graph: CompiledGraph) -> list[Any] | None:
    """The part of the model of each kernel; None where nothing is claimed, an empty tuple outside MoE."""
    stretches = match_launches(names, graph)
    if stretches is None or not is_consistent(names, stretches, graph):
        return None
    found: list[Any] = [()] * len(names)
    for stretch in stretches:
        launch = part_of(stretch, graph)
        for i in stretch.kernels:
            found[i] = launch.parts if launch is not None else None
    return found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_replays_are_told_right_or_not_at_all(data: st.DataObject) -> None:
    graph, calls = graph_and_names(data.draw(st.sampled_from(["compiled_model", "without_graphs"])))
    names = list(calls[0])
    truth: list[Any] = list(labels(calls[0], graph) or [])
    assert truth
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(names) - 1))
        kind = data.draw(st.sampled_from(["rename", "drop", "add", "swap"]))
        if kind == "rename":
            names[at] = data.draw(st.sampled_from([*names, "another_kernel"]))
        elif kind == "drop" and len(names) > 1:
            del names[at], truth[at]
        elif kind == "add":
            names.insert(at, data.draw(st.sampled_from([*names, "another_kernel"])))
            truth.insert(at, "foreign")
        else:
            other = data.draw(st.integers(0, len(names) - 1))
            names[at], names[other] = names[other], names[at]
            truth[at], truth[other] = truth[other], truth[at]
    if tuple(names) == calls[0]:
        return  # two changes undid each other, or swapped what is alike
    usual = usual_sequences((graph, sequence) for sequence in (calls[0], tuple(names), calls[0]))
    assert usual[graph] == calls[0] != tuple(names), "the changed replay is not the usual one: it is unknown"
    alone = labels(tuple(names), graph)
    if alone is not None:  # what the names alone let pass: no generated kernel is another than it says
        generated = [n for n in names if n.startswith("triton_")]
        assert generated == [launch.kernel for launch in graph.launches if launch.generated]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({}, None),  # one may run both kernels, and the other none
        ({"mm": {1}}, None),
        ({"mm": {1}, "topk": {2}}, None),
        ({"mm": {1}, "topk": {1}}, [(range(0, 1), (0,)), (range(1, 2), (1,))]),
    ],
)
def test_neighbours_of_two_layers_have_a_kernel_each_only_where_both_run_one_elsewhere(
    lengths: dict[str, set[int]], expected: list[tuple[range, tuple[int, ...]]] | None
) -> None:
    parts = tuple(LaunchPart(routers=(name,), place="router") for name in ("a", "b"))
    launches = tuple(
        CompiledLaunch(kernel=kernel, generated=False, parts=(part,))
        for part, kernel in enumerate(("mm", "topk"))
    )
    graph, names = CompiledGraph(parts=parts, launches=launches), ["kernel", "another"]
    [stretch] = match_launches(names, graph) or []
    found = split(names, stretch, graph, lengths)
    if expected is None:
        assert found == [stretch] and part_of(stretch, graph) is None
    else:
        assert [(one.kernels, one.launches) for one in found] == expected


@pytest.mark.parametrize("name", ALL)
def test_graphs_survive_the_file(name: str) -> None:
    recording = read_trace(path_of(name)).recording
    text = encode_recording(recording)
    assert decode_recording(json.loads(text)).compiled_graphs == recording.compiled_graphs
    encoded = json.dumps(encode_compiled(recording.compiled_graphs))
    assert len(encoded) < 200 * sum(len(graph.launches) for graph in recording.compiled_graphs)
    assert decode_compiled(json.loads(encoded) | {"version": 3}) == ()


@pytest.mark.parametrize(
    "broken", [{"kernels": []}, {"graphs": [{"parts": [["attic", "a"]], "launches": [], "backward": False}]}]
)
def test_a_changed_list_is_refused(broken: dict[str, Any]) -> None:
    graph, _ = graph_and_names("compiled_model")
    with pytest.raises((ValueError, LookupError)):
        decode_compiled(encode_compiled([graph]) | broken)


def test_kernels_on_another_stream_are_not_told() -> None:
    trace = read_trace(path_of("compiled_model"))
    kernels = find_kernels(trace.events)
    stream = kernels.stream.copy()
    link = np.bincount(kernels.link).argmax()  # a replay's
    stream[np.flatnonzero(kernels.link == link)[::2]] += 1
    times = measure_all(trace.recording, trace.events, replace(kernels, stream=stream))
    assert times.coverage.compiled.joined == 4 and times.coverage.compiled.total == 6
