"""Tests of every set of activities: samples are in file and timeline, or a note names the true cause."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import moe_trace
from models import tiny_olmoe, token_batch
from moe_trace.data.calls.table import placed_by_clock
from moe_trace.data.schema import BAND_PID
from moe_trace.read.check import check, read_checked
from moe_trace.read.reader import read_recording
from moe_trace.timeline.correlate import reasons
from moe_trace.timeline.merge import merge_recording
from paths import DATA
from spliced import recording_in, without_additions

CPU, CUDA = ProfilerActivity.CPU, ProfilerActivity.CUDA
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "record_shapes": {"record_shapes": True},
    "with_stack": {"with_stack": True},
    "profile_memory": {"profile_memory": True},
    "with_modules": {"with_modules": True},
    "with_flops": {"with_flops": True},
    "acc_events": {"acc_events": True},
    "all": {
        "record_shapes": True,
        "with_stack": True,
        "profile_memory": True,
        "with_modules": True,
        "with_flops": True,
        "acc_events": True,
    },
}
ACTIVITIES = [
    pytest.param([CPU], id="cpu"),
    pytest.param([CPU, CUDA], id="both", marks=pytest.mark.cuda),
    pytest.param([CUDA], id="cuda", marks=pytest.mark.cuda),
]


def model_and_batch(activities: list[Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    model, batch = tiny_olmoe(layers=2), token_batch()
    if CUDA in activities:
        model, batch = model.to("cuda"), {name: value.cuda() for name, value in batch.items()}
    return model, batch


def events_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    found: list[dict[str, Any]] = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)[
        "traceEvents"
    ]
    return found


def band_of(path: Path, phase: str) -> list[dict[str, Any]]:
    return [event for event in events_of(path) if event.get("pid") == BAND_PID and event["ph"] == phase]


def broken_rules(path: Path) -> set[str]:
    return {rule for rule, found in check(read_checked(path)).items() if found}


def assert_whole(path: Path, calls: int, activities: list[Any]) -> None:
    """All calls are there, drawn, and none without its cause."""
    recording = read_recording(path)
    lost = recording.lost
    by_clock = 0 if CPU in activities else calls
    assert (len(recording.samples), lost.samples_without_range, lost.ranges_without_sample) == (calls, 0, 0)
    assert lost.without_range == ({reasons.NO_CPU: calls} if by_clock else {})
    assert sum(placed_by_clock(recording.calls)) == by_clock
    assert len(band_of(path, "X")) == (calls if by_clock else 2 * calls)
    assert {"load max÷mean", "router entropy (nats)"} <= {event["name"] for event in band_of(path, "C")}
    assert broken_rules(path) <= ({"kernels_have_launches"} if CUDA in activities else set())
    notes = moe_trace.read_summary(path).notes
    assert any("ProfilerActivity.CPU" in note for note in notes) == bool(by_clock)
    assert not any("dropped" in note for note in notes)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activities", ACTIVITIES)
def test_every_option_keeps_every_call(
    tmp_path: Path, activities: list[Any], options: dict[str, Any]
) -> None:
    (model, batch), path = model_and_batch(activities), tmp_path / "trace.json"
    with torch.no_grad(), moe_trace.profile(model, activities=activities, **options) as prof:
        for _ in range(2):
            model(**batch)
            prof.step()
    prof.export_chrome_trace(str(path))
    assert_whole(path, 4, activities)


@pytest.mark.parametrize("acc_events", [False, True])
@pytest.mark.parametrize("activities", ACTIVITIES)
def test_every_cycle_of_a_schedule_holds_its_own_calls(
    tmp_path: Path, activities: list[Any], acc_events: bool
) -> None:
    model, batch = model_and_batch(activities)
    cycles: list[Path] = []

    def export(prof: Any) -> None:
        cycles.append(tmp_path / f"{len(cycles)}.json")
        prof.export_chrome_trace(str(cycles[-1]))

    with (
        torch.no_grad(),
        moe_trace.profile(
            model,
            activities=activities,
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=2),
            on_trace_ready=export,
            acc_events=acc_events,
        ) as prof,
    ):
        for _ in range(8):
            model(**batch)
            prof.step()
    assert len(cycles) == 2
    for path, steps in zip(cycles, ({2, 3}, {6, 7}), strict=True):
        assert_whole(path, 4, activities)
        assert set(read_recording(path).calls.step.tolist()) == steps


# -- a real trace without events of the host --------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the profiler wrote it on an H100, and merged by this release."""
    source = DATA / "h100" / "prefill_cuda_only.pt.trace.json.gz"
    folder = tmp_path_factory.mktemp("cuda_only")
    unpacked, path = folder / "unpacked.json", folder / "trace.json"
    unpacked.write_bytes(gzip.decompress(source.read_bytes()))
    path.write_bytes(without_additions(unpacked))
    assert b'"moe' not in path.read_bytes()
    merge_recording(path, [read_recording(source)])
    return path


def test_without_events_of_the_host_the_clock_tells_the_place(cuda_only: Path) -> None:
    """The runtime's own launches stand in that trace: each router's kernels start inside its slice."""
    trace, samples = json.loads(cuda_only.read_bytes()), read_recording(cuda_only).samples
    starts = [(s.host_start_ns - trace["baseTimeNanoseconds"]) / 1000 for s in samples]
    slices = band_of(cuda_only, "X")
    assert sorted(event["ts"] for event in slices) == pytest.approx(sorted(starts), abs=1e-3)
    assert len(slices) == len(samples) == 4
    launches = [e for e in trace["traceEvents"] if e.get("cat") == "cuda_runtime" and "Launch" in e["name"]]
    per_router = [
        sum(e["ts"] <= launch["ts"] <= e["ts"] + e["dur"] for launch in launches if launch["tid"] == s.thread)
        for e, s in zip(slices, samples, strict=True)
    ]
    assert min(per_router) == max(per_router) > 2  # the same kernels in each call
    counters = [e for e in band_of(cuda_only, "C") if e["name"] == "load max÷mean"]
    assert len(counters) == 2 * len(samples) and {e["args"]["value"] for e in counters[1::2]} == {0}


def test_without_events_of_the_host_the_report_says_why(cuda_only: Path) -> None:
    assert broken_rules(cuda_only) == set()
    summary = moe_trace.read_summary(cuda_only)
    assert summary.lost.samples_without_range == 0
    assert summary.lost.without_range == {reasons.NO_HOST_EVENTS: 4}
    assert all(r.latency.device_span is r.latency.device_busy is None for r in summary.routers)
    assert summary.phases is None
    about = [note for note in summary.notes if "range" in note]
    assert any("ProfilerActivity.CPU" in note for note in about)
    assert not any("dropped" in note or "fewer steps" in note for note in summary.notes)


# -- the other causes -------------------------------------------------------------------------------------


def recorded(path: Path, run: Callable[[Any], None] | None = None) -> tuple[Any, Any]:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), moe_trace.profile(model, activities=[CPU]) as prof:
        run(model) if run is not None else model(**token_batch())
    return prof, model


def keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    trace = json.loads(path.read_bytes())
    trace["traceEvents"] = [event for event in trace["traceEvents"] if wanted(event)]
    path.write_text(json.dumps(trace))


def causes_after(path: Path, prof: Any, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, int]:
    prof.export_chrome_trace(str(path))
    keep(path, wanted)
    prof.tracer.merge_into(path)
    return read_recording(path).lost.without_range


def test_a_thread_that_the_profiler_does_not_record(tmp_path: Path) -> None:
    def in_a_thread(model: Any) -> None:
        torch.zeros(1)  # so that the profiler's own thread has an event
        thread = threading.Thread(target=lambda: model(**token_batch()))
        thread.start()
        thread.join()

    prof, _ = recorded(tmp_path, in_a_thread)
    assert causes_after(tmp_path / "a.json", prof, lambda event: True) == {reasons.OTHER_THREAD: 2}
    assert broken_rules(tmp_path / "a.json") == set()


def test_annotations_that_a_tool_took_out(tmp_path: Path) -> None:
    prof, _ = recorded(tmp_path)
    path = tmp_path / "a.json"
    assert causes_after(path, prof, lambda e: e.get("cat") != "user_annotation") == {
        reasons.NO_ANNOTATIONS: 2
    }
    assert len(band_of(path, "X")) == 2


def test_one_range_that_was_dropped(tmp_path: Path) -> None:
    prof, _ = recorded(tmp_path)
    path = tmp_path / "a.json"
    assert causes_after(path, prof, lambda e: e["name"] != "moe.router/L01") == {reasons.DROPPED: 1}
    assert read_recording(path).lost.samples_without_range == 1
    assert len(band_of(path, "X")) == 2  # router and experts of the other
    notes = [note for note in moe_trace.read_summary(path).notes if "no range" in note]
    assert len(notes) == 1 and notes[0].startswith("1 router calls have no range in the trace: it holds")


@pytest.mark.parametrize("known", [True, False], ids=["exported", "merged later"])
def test_activities_without_the_cpu(tmp_path: Path, known: bool) -> None:
    """The profiler that is asked for CUDA alone writes no event of the host."""
    prof, path = recorded(tmp_path)[0], tmp_path / "a.json"
    write = prof.export_chrome_trace.__wrapped__

    def is_of_device(event: dict[str, Any]) -> bool:
        return event.get("cat") not in ("cpu_op", "user_annotation")

    def write_those_of_the_device(name: str) -> None:
        write(name)
        keep(Path(name), is_of_device)

    if known:
        bare = _Exporter(write_those_of_the_device)
        prof.tracer.attach(bare)
        bare.export_chrome_trace(str(path))
    else:
        write_those_of_the_device(str(path))
        prof.tracer.merge_into(path)
    cause = reasons.NO_CPU if known else reasons.NO_HOST_EVENTS
    assert read_recording(path).lost.without_range == {cause: 2}


class _Exporter:
    """Of a profiler, what attaching needs."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.activities = {CUDA}
        self.export_chrome_trace = write


def test_a_profiler_that_stops_inside_a_forward(tmp_path: Path) -> None:
    model, path = tiny_olmoe(layers=2), tmp_path / "a.json"
    prof = moe_trace.profile(model, activities=[CPU])
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        prof.start()
        model(**token_batch())
        with_stop = gate.register_forward_hook(lambda *_: prof.stop())
        model(**token_batch())
        with_stop.remove()
    prof.export_chrome_trace(str(path))
    recording = read_recording(path)
    assert [sample.placement is not None for sample in recording.samples] == [True] * 3
    assert recording.lost.ranges_without_sample == 1 and recording.lost.without_range == {}
    assert recording.lost.calls == {recording.routers[1].name: {"interrupted": 1}}
    assert any("recording was stopped" in note for note in moe_trace.read_summary(path).notes)


def test_a_trace_of_an_older_release_names_no_cause_that_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    shutil.copy(DATA / "h100" / "prefill_cuda_only.pt.trace.json.gz", path)
    assert recording_in(json.loads(gzip.decompress(path.read_bytes())))["lost"]["samples_without_range"] == 4
    notes = moe_trace.read_summary(path).notes
    assert any("does not say why" in note for note in notes)
    assert not any("dropped" in note for note in notes)
