"""Tests of merged traces in each program that opens them (docs/trace_format.md).

A program is run if it is installed; otherwise its rule, from its source or documentation, is checked on the
file."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import moe_trace
from models import tiny_olmoe, token_batch
from moe_trace.data.codec import encode_recording
from moe_trace.data.schema import BAND_PID
from moe_trace.read.reader import read_recording
from moe_trace.timeline.merge import merge_recording
from paths import DATA, ROOT
from spliced import recording_in, without_additions

GPU_TRACES = {
    "gpu": DATA / "h100" / "prefill_all_options.pt.trace.json.gz",
    "graphs": DATA / "h200_graphs" / "by_hand.pt.trace.json.gz",
}


@pytest.fixture(scope="module", params=["cpu", *GPU_TRACES])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace that this release merged, plain."""
    path = tmp_path_factory.mktemp(request.param) / "worker.pt.trace.json"
    if request.param == "cpu":
        model = tiny_olmoe(layers=2)
        with torch.no_grad(), moe_trace.profile(model, activities=[ProfilerActivity.CPU]) as prof:
            model(**token_batch())
        prof.export_chrome_trace(str(path))
        return path
    source = GPU_TRACES[request.param]
    path.write_bytes(gzip.decompress(source.read_bytes()))
    merge_recording(path, [read_recording(source)])
    return path


@pytest.fixture
def plain(merged: Path, tmp_path: Path) -> Path:
    """As the profiler wrote it."""
    path = tmp_path / "worker.pt.trace.json"
    path.write_bytes(without_additions(merged))
    return path


def added_events(path: Path) -> list[dict[str, Any]]:
    """What merging added, as any reader of JSON sees it."""
    events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    return [event for event in events if event.get("pid") == BAND_PID]


# -- torch-tb-profiler ------------------------------------------------------------------------------------


def test_torch_tb_profiler_may_write_its_counters_at_the_last_bracket(merged: Path) -> None:
    """`RunProfile.append_gpu_metrics`, which it calls for every trace with GPU kernels."""
    pytest.importorskip("torch_tb_profiler.plugin")
    from torch_tb_profiler.run import RunProfile

    profile = RunProfile.__new__(RunProfile)
    profile.gpu_metrics = ['{"ph":"C","name":"GPU 0 Utilization","pid":0,"ts":1,"args":{"v":1}}']
    shown = json.loads(gzip.decompress(profile.append_gpu_metrics(merged.read_bytes())))
    assert shown["traceEvents"][-1]["name"] == "GPU 0 Utilization"
    assert [e for e in shown["traceEvents"] if e.get("pid") == BAND_PID] == added_events(merged)


def test_torch_tb_profiler_computes_the_same_views(merged: Path, plain: Path) -> None:
    pytest.importorskip("torch_tb_profiler.plugin")
    from torch_tb_profiler.profiler.data import RunProfileData

    one, other = (RunProfileData.parse("worker", None, str(path), None) for path in (plain, merged))
    for name in ("avg_costs", "steps_names", "has_runtime", "has_kernel", "has_memcpy_or_memset", "use_dp"):
        assert _plainly(getattr(one, name)) == _plainly(getattr(other, name)), name
    for name in ("op_list_groupby_name", "kernel_list_groupby_name_op"):
        assert len(getattr(one, name) or ()) == len(getattr(other, name) or ()), name
    assert one.op_list_groupby_name


def _plainly(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else value


# -- TensorBoard's core -----------------------------------------------------------------------------------


def test_tensorboards_core_leaves_the_file_alone() -> None:
    """It reads files of events, which it knows by their names."""
    io_wrapper = pytest.importorskip("tensorboard.backend.event_processing.io_wrapper")
    assert io_wrapper.IsTensorFlowEventsFile("runs/events.out.tfevents.1")
    for name in ("worker.pt.trace.json", "worker.pt.trace.json.gz"):
        assert not io_wrapper.IsTensorFlowEventsFile(f"runs/{name}")


# -- the viewer of chrome://tracing, as torch-tb-profiler carries it --------------------------------------


def test_the_chrome_viewer_knows_every_metadata_event(merged: Path) -> None:
    """It warns of any other name (`processMetadataEvent` in its source). Driven in tests/browser."""
    package = pytest.importorskip("torch_tb_profiler")
    source = Path(package.__file__).with_name("static") / "trace_viewer_full.html"
    known = set(re.findall(r"event\.name==='(\w+)'", source.read_text("utf-8", "replace")))
    names = {event["name"] for event in added_events(merged) if event["ph"] == "M"}
    assert {"process_name", "process_labels"} <= names <= known


def test_the_chrome_viewer_can_draw_every_event(merged: Path) -> None:
    """Times are numbers, counters hold numbers alone and end at 0, slices of a lane do not cross."""
    counters: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for event in added_events(merged):
        assert isinstance(event["ts"], int | float) and isinstance(event["tid"], int)
        assert event["ph"] in ("M", "C", "X")
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
            counters.setdefault(event["name"], []).append((event["ts"], event["args"]))
    assert counters
    for points in counters.values():
        assert set(points[-1][1].values()) == {0}


# -- Perfetto's JSON importer -----------------------------------------------------------------------------


def test_perfetto_ignores_the_event_with_the_recording(merged: Path) -> None:
    """Not run here, for it is no Python. Its importer (`json_trace_parser_impl.cc`) takes `thread_name` and
    `process_name` of the metadata events and leaves the others; ids must be numbers, as must counters."""
    carriers = [event for event in added_events(merged) if "moe_trace" in event.get("args", {})]
    assert [event["name"] for event in carriers] == ["process_labels"]
    assert all(type(event["pid"]) is int and type(event["tid"]) is int for event in added_events(merged))
    assert 0 < BAND_PID < 2**31  # its process ids are of 32 bits


# -- HolisticTraceAnalysis: test_hta.py runs it -----------------------------------------------------------


# -- TraceLens --------------------------------------------------------------------------------------------


def test_tracelens_knows_every_metadata_event(merged: Path) -> None:
    """Not run here, for it is on no package index. `TraceEventUtils.split_event_list` looks each name up
    among these five, and raises KeyError for any other."""
    five = {"process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index"}
    assert {event["name"] for event in added_events(merged) if event["ph"] == "M"} <= five


def test_a_strict_parser_reads_it(merged: Path) -> None:
    """TraceLens uses orjson, which refuses NaN; so does every browser."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    json.loads(merged.read_text("utf-8"), parse_constant=refuse)


# -- torch's own validator --------------------------------------------------------------------------------


def test_torchs_validator_finds_what_it_finds_in_the_plain_trace(merged: Path, plain: Path) -> None:
    validator = pytest.importorskip("torch.profiler._trace_validator")
    assert validator.validate_trace(str(merged)) == validator.validate_trace(str(plain))


# -- json.dump by anybody ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "style",
    [{}, {"indent": 2}, {"sort_keys": True}, {"separators": (",", ":")}, {"ensure_ascii": False}],
    ids=str,
)
def test_saved_again_it_holds_the_same_recording(merged: Path, tmp_path: Path, style: dict[str, Any]) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(json.loads(merged.read_bytes()), **style), "utf-8")
    one, other = (json.loads(encode_recording(read_recording(path))) for path in (saved, merged))
    assert one == other and one["samples"]["call"]


# -- jq ---------------------------------------------------------------------------------------------------


def test_the_jq_commands_of_the_document_print_what_they_promise(merged: Path, tmp_path: Path) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    text = (ROOT / "docs" / "trace_format.md").read_text("utf-8")
    commands = re.findall(r"^jq .*$", text, re.MULTILINE)
    assert len(commands) >= 4
    shutil.copy(merged, tmp_path / "trace.json")

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # jq before 1.7 has every number as a double.
    recording = recording_in(json.loads(merged.read_bytes(), parse_int=float))
    whole, losses, routers, calls = map(run, commands[:4])
    assert json.loads(whole, parse_int=float) == recording
    assert json.loads(losses, parse_int=float) == recording["lost"]
    assert [line.split() for line in routers.splitlines()] == [
        [router["site"], router["name"], f"{router['num_experts']:.0f}"] for router in recording["routers"]
    ]
    assert int(calls) == len(recording["samples"]["call"])


# -- the bytes --------------------------------------------------------------------------------------------


def test_nothing_of_ours_stands_behind_the_events(merged: Path, plain: Path) -> None:
    data, original = merged.read_bytes(), plain.read_bytes()
    splice = recording_in(json.loads(data))["splice"]
    start, end = splice["offset"], splice["offset"] + splice["band_bytes"] + splice["event_bytes"]
    assert data[:start] + data[end:] == original
    assert data[end:].lstrip().startswith(b"]")
