"""Tests of lanes of compiled code in merged real traces of an H100 and a CPU, against the report's phases."""

from __future__ import annotations

import gc
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_trace import merge_into
from moe_trace.data.calls.placements import Side
from moe_trace.data.calls.table import CallTable, routers_timed
from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.trace_json.events import EventTable
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.check import check, read_checked
from moe_trace.read.file.trace_file import read_trace
from moe_trace.read.time.call_times import measure_all
from moe_trace.read.time.phase_detection import COMBINE, DISPATCH, EXPERTS, ROUTER
from moe_trace.timeline.correlate.compiled_calls import CompiledCalls
from moe_trace.timeline.correlate.reasons import FUSED
from moe_trace.timeline.correlate.replays import Replays
from moe_trace.timeline.placed_calls import PlacedCalls
from paths import ROOT
from spliced import recording_in, without_additions

FOLDER = ROOT / "tests" / "data"
ON_CPU = [
    f"cpu_compiled/{way}"
    for way in (
        *("without_graphs", "layers_without_graphs", "compiled_training", "training_layers"),
        *("without_graphs_torch_2_14", "training_layers_torch_2_14"),
    )
]
ONE_BY_ONE = ["without_graphs", "layers_without_graphs", "compiled_training", "training_layers"]
IN_GRAPHS = ["compiled_model", "compiled_layers", "compiled_blocks", "compiled_function"]


def merged(name: str, tmp_path: Path, change: Any = None) -> Path:
    """A trace with what we add made anew, after the profiler's events were changed."""
    folder, _, way = name.rpartition("/")
    recorded = FOLDER / (folder or "h100_compiled") / f"{way}.pt.trace.json.gz"
    recording = read_trace(recorded).recording
    path = tmp_path / f"{way}.json"
    path.write_bytes(gzip.decompress(recorded.read_bytes()))
    path.write_bytes(without_additions(path))
    if change is not None:
        trace = json.loads(path.read_bytes())
        change(trace["traceEvents"])
        path.write_text(json.dumps(trace))
    merge_into(path, recording)
    return path


def slices_of(path: Path) -> list[dict[str, Any]]:
    """Those of the band, each with the name of its lane."""
    events = json.loads(path.read_bytes())["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [{**e, "lane": lanes[e["pid"], e["tid"]]} for e in events if e.get("cat") == "moe_trace"]


def without_ranges_of_kernels(events: list[dict[str, Any]]) -> None:
    """As without `cpp.enable_kernel_profile`."""
    events[:] = [e for e in events if "_cpp_" not in e["name"]]


def busy_ns(calls: CallTable, kind: Any) -> list[int]:
    return np.rint(1000 * calls.places.busy(kind)).astype(np.int64).tolist()


@pytest.mark.parametrize("name", ["without_graphs", "compiled_model"])
def test_what_a_merge_reads_is_freed_without_a_garbage_collection(name: str, tmp_path: Path) -> None:
    """Arrays in a reference cycle would wait for one, which large training jobs switch off."""
    gc.collect()
    gc.disable()
    try:
        merged(name, tmp_path)
        kinds = (EventTable, PlacedCalls, CompiledCalls, Replays)
        assert [type(thing) for thing in gc.get_objects() if type(thing) in kinds] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [*ONE_BY_ONE, *IN_GRAPHS, *ON_CPU])
def test_the_lanes_of_every_call_are_as_long_as_the_phases_of_the_report(name: str, tmp_path: Path) -> None:
    path = merged(name, tmp_path)
    trace = read_trace(path)
    times = measure_all(trace.recording, trace.events, find_kernels(trace.events))
    side: Side = "host" if name in ON_CPU else "device"
    calls, phases = times.samples, times.work_ns(times.forward)
    assert phases is not None
    assert len(calls) == len(trace.recording.samples) == 6
    assert busy_ns(calls, "router") == phases[:, ROUTER].tolist()
    assert busy_ns(calls, "experts") == phases[:, [DISPATCH, EXPERTS, COMBINE]].sum(1).tolist()
    assert not trace.recording.lost.untimed and not any(check(read_checked(path)).values())
    slices = slices_of(path)
    for lane in ("router", "experts"):
        spans = calls.places.span(side, lane)
        assert (spans[:, 1] >= calls.places.busy(lane) - 0.001).all()
        mine = [e for e in slices if e["lane"].startswith(lane)]
        assert sorted([e["ts"], e["dur"]] for e in mine) == sorted(spans.tolist())
        assert {e["name"] for e in mine} == set(calls.site)
        assert all(e["args"]["clock"] == side and e["args"]["in graph"] for e in mine)
    experts = [e for e in slices if e["lane"].startswith("experts")]
    assert all(e["args"]["router and experts"] == BY_COMPILER for e in experts)


def test_the_lanes_are_those_of_the_same_model_in_cuda_graphs(tmp_path: Path) -> None:
    shown = [
        {(e["lane"], e["name"], e["pid"], e["tid"]) for e in slices_of(merged(name, tmp_path))}
        for name in ("without_graphs", "compiled_model", *ON_CPU)
    ]
    assert all(one == shown[0] for one in shown)
    assert {lane for lane, *_ in shown[0]} == {"router", "experts", "graph"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(("without_graphs", changed) for changed in ("triton_", "nvjet", "gatherTopK")),
        *((ON_CPU[0], changed) for changed in ("_cpp_fused", "aten::mm", "aten::topk")),
    ],
)
def test_a_forward_with_one_kernel_changed_has_no_lane(name: str, changed: str, tmp_path: Path) -> None:
    side: Side = "host" if name in ON_CPU else "device"

    def change(events: list[dict[str, Any]]) -> None:
        kernels = [e for e in events if e.get("cat") in ("kernel", "cpu_op") and changed in e["name"]]
        max(kernels, key=lambda e: e["ts"])["name"] += "_another"

    calls = read_trace(merged(name, tmp_path, change)).recording.calls
    assert routers_timed(calls).tolist() == [True] * 4 + [False] * 2
    assert np.isnan(calls.duration_us(side, "experts")).tolist() == [False] * 4 + [True] * 2
    recording = read_trace(tmp_path / "without_graphs.json").recording
    assert sum(recording.lost.untimed.values()) == 2


def test_events_are_read_only_where_a_router_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them all takes longer than the rest of a merge."""
    monkeypatch.setattr("moe_trace.timeline.compiled_spans._read", lambda events: pytest.fail("read"))
    merged("compiled_model", tmp_path)
    merged("compiled_layers", tmp_path)
    merged(ON_CPU[0], tmp_path, without_ranges_of_kernels)
    with pytest.raises(pytest.fail.Exception, match="read"):
        merged("without_graphs", tmp_path)


def test_lists_without_launches_cost_no_read_of_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of code that chooses between branches: no kernel is known by them."""
    path = merged("without_graphs", tmp_path)
    recording = read_trace(path).recording
    lists = [replace(graph, launches=(), problem="branches") for graph in recording.compiled_graphs]
    monkeypatch.setattr("moe_trace.timeline.compiled_spans._read", lambda events: pytest.fail("read"))
    merge_into(path, replace(recording, compiled_graphs=tuple(lists)))
    assert read_trace(path).recording.compiled_graphs == tuple(lists)


@pytest.mark.parametrize("error", [MemoryError(), KeyError("kernel")])
def test_a_join_that_fails_costs_the_lanes_and_no_more(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("moe_trace.timeline.compiled_spans.join_compiled", fail)
    with pytest.warns(RuntimeWarning, match=f"lanes .* could not be made .{type(error).__name__}"):
        path = merged("without_graphs", tmp_path)
    recording = read_trace(path).recording
    assert len(recording.samples) == 6 and recording.calls.places.placed.all()
    assert recording.lost.untimed == {FUSED: 6}
    assert {e["lane"] for e in slices_of(path)} == {"graph"}


@pytest.mark.parametrize(
    ("moved_us", "rules"),
    [(0.002, {"placements_are_ranges"}), (-1e6, {"placements_are_ranges", "times_are_inside_graphs"})],
)
def test_check_finds_a_router_that_no_operators_show(
    moved_us: float, rules: set[str], tmp_path: Path
) -> None:
    path = merged(ON_CPU[0], tmp_path)
    trace = json.loads(path.read_bytes())
    recording_in(trace)["samples"]["placement"][0][0][0][0] += moved_us
    path.write_text(json.dumps(trace))
    broken = {rule for rule, found in check(read_checked(path)).items() if found}
    assert rules == broken - {"slices_are_the_calls", "counters_stand_in_ranges", "lanes_do_not_cross"}
