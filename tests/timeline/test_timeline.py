"""Tests of placing and merging: the file around our additions stays Kineto's; every event is in its place."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import moe_trace
from models import tiny_olmoe, token_batch
from moe_trace.data.schema import BAND_PID, Lost, Span
from moe_trace.timeline.additions import read_added
from moe_trace.timeline.correlate.calls import place_samples
from moe_trace.timeline.correlate.scan import RangeEvent
from moe_trace.timeline.merge import merge_recording
from paths import DATA
from spliced import recording_in, without_additions

CPU = [ProfilerActivity.CPU]


def profiled(model: Any, steps: int = 2, **arguments: Any) -> moe_trace.profile:
    batch = token_batch()
    with torch.no_grad(), moe_trace.profile(model, activities=CPU, **arguments) as prof:
        for _ in range(steps):
            model(**batch)
            prof.step()
    return prof


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    prof = profiled(tiny_olmoe())
    prof.export_chrome_trace(str(path))
    return path, prof.tracer.samples()


def host_ranges(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith("moe."):
            found[event["name"]].append(event)
    return found


def inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    end = event["ts"] + event.get("dur", 0)
    return outer["ts"] <= event["ts"] and end <= outer["ts"] + outer["dur"]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_bytes_around_the_additions_are_what_the_profiler_wrote(tmp_path: Path, suffix: str) -> None:
    """Keep a copy of what torch writes, from inside the export, and compare."""
    model, kept = tiny_olmoe(), tmp_path / "kept.json"
    with torch.no_grad(), torch.profiler.profile(activities=CPU) as prof:
        with moe_trace.MoETracer(model, auto_attach=False) as tracer:
            model(**token_batch())
    write = prof.export_chrome_trace

    def write_and_keep(path: str) -> None:
        write(path)
        shutil.copy(path, kept)

    prof.export_chrome_trace = write_and_keep  # type: ignore[method-assign]
    tracer.attach(prof)
    target = tmp_path / f"trace{suffix}"
    prof.export_chrome_trace(str(target))
    if suffix.endswith("gz"):
        plain = tmp_path / "plain.json"
        plain.write_bytes(gzip.decompress(target.read_bytes()))
        target = plain
    assert without_additions(target) == kept.read_bytes()
    assert len(recording_in(json.loads(target.read_bytes()))["samples"]["call"]) == 3


def test_every_sample_is_placed_in_the_range_that_holds_it(trace: tuple[Path, list[Any]]) -> None:
    path, samples = trace
    data = json.loads(path.read_bytes())
    ranges = host_ranges(data["traceEvents"])
    assert set(ranges) == {f"moe.{kind}/L0{i}" for kind in ("router", "experts", "block") for i in range(3)}
    assert recording_in(data)["lost"]["samples_without_range"] == 0
    assert recording_in(data)["lost"]["ranges_without_sample"] == 0
    for sample in samples:
        start_us = (sample.host_start_ns - data["baseTimeNanoseconds"]) / 1000
        holding = [
            event
            for event in ranges[f"moe.router/{sample.site}"]
            if event["ts"] <= start_us <= event["ts"] + event["dur"]
        ]
        assert len(holding) == 1
        assert sample.placement.host["router"] == Span(holding[0]["ts"], holding[0]["dur"])
        assert not sample.placement.device


def test_counters_and_lanes_lie_inside_their_ranges(trace: tuple[Path, list[Any]]) -> None:
    path, samples = trace
    events = json.loads(path.read_bytes())["traceEvents"]
    ranges = host_ranges(events)
    band = [event for event in events if event.get("pid") == BAND_PID]
    lanes = {e["tid"]: e["args"]["name"] for e in band if e["name"] == "thread_name"}
    assert sorted(lanes.values()) == ["experts", "router"]
    slices = [event for event in band if event["ph"] == "X"]
    assert len(slices) == 2 * len(samples)
    for event in slices:
        candidates = ranges[f"moe.{lanes[event['tid']]}/{event['name']}"]
        assert sum((event["ts"], event["dur"]) == (c["ts"], c["dur"]) for c in candidates) == 1
    blocks = [event for name, found in ranges.items() if name.startswith("moe.block/") for event in found]
    counters = [event for event in band if event["ph"] == "C"]
    assert {c["name"] for c in counters} == {
        "load max÷mean",
        "router entropy (nats)",
        "active experts",
        "expert TFLOP/s (with gaps)",
    }
    edges = {block["ts"] for block in blocks}, {block["ts"] + block["dur"] for block in blocks}
    for event in counters:
        assert event["ts"] in edges[0 if event["args"]["value"] else 1]


def test_lanes_of_overlapping_layers_never_cross() -> None:
    from moe_trace.timeline.counter_tracks import band_events
    from moe_trace.timeline.placed_calls import PlacedCalls

    prof = profiled(tiny_olmoe(), steps=1)
    ranges = [
        RangeEvent(kind, f"L0{i}", Span(1000.0 + 10 * i, 25.0), 1, i, None, False)  # three threads at once
        for i in range(3)
        for kind in ("router", "block")
    ]
    samples = [
        _moved(sample, start_ns=int((1001 + 10 * i) * 1000), thread=i)
        for i, sample in enumerate(prof.tracer.samples())
    ]
    placed = place_samples(samples, ranges, base_time_ns=0, window=None)
    assert (placed.samples_without_range, placed.ranges_without_sample) == (0, 0)
    events = [json.loads(event) for event in band_events(PlacedCalls.of(placed.samples), rank=0)]
    lanes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(lanes) == 3
    for spans in lanes.values():
        spans.sort()
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    names = {e["name"] for e in events if e["ph"] == "C"}
    assert {"load max÷mean", "load max÷mean (2)", "load max÷mean (3)"} <= names


def _moved(sample: Any, *, start_ns: int, thread: int) -> Any:
    return replace(sample, host_start_ns=start_ns, thread=thread, placement=None)


def test_merging_again_replaces_what_was_added(trace: tuple[Path, list[Any]], tmp_path: Path) -> None:
    path, samples = trace
    copy = tmp_path / "again.json"
    shutil.copy(path, copy)
    moe_trace.merge_into(copy, samples)
    assert without_additions(copy) == without_additions(path)
    with copy.open("rb") as file:
        assert read_added(file) is not None
    assert len(recording_in(json.loads(copy.read_bytes()))["samples"]["call"]) == len(samples)


def test_a_slice_names_the_busiest_experts_and_the_recording_holds_all(
    trace: tuple[Path, list[Any]],
) -> None:
    path, samples = trace
    data = json.loads(path.read_bytes())
    assert recording_in(data)["samples"]["assignments"] == [s.assignments.tolist() for s in samples]
    counts = {(s.name, s.call): s.assignments for s in samples}
    slices = [e for e in data["traceEvents"] if e.get("cat") == "moe_trace"]
    whole = [e["args"] for e in slices if "assignments" in e["args"]]
    assert len(whole) == len(samples) == len(slices) / 2  # those of the experts
    for event in slices:
        assert {"router", "call", "tokens", "router entropy (nats)"} <= event["args"].keys()
    for args in whole:
        chosen = counts[args["router"], args["call"]]
        assert args["assignments"] == chosen.sum()
        assert list(args["busiest experts"].values()) == sorted(chosen[chosen > 0].tolist())[::-1][:4]
        assert all(chosen[int(name[1:])] == count for name, count in args["busiest experts"].items())


def test_what_two_tracers_lost_is_added_up(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    prof = profiled(tiny_olmoe())
    prof.export_chrome_trace(str(path))
    recording = prof.tracer.recording()
    names = ("unreduced", "padding_unknown", "overwritten", "silent_forwards")
    both = [
        replace(recording, lost=Lost(**{name: n * (1 + i) for i, name in enumerate(names)})) for n in (1, 10)
    ]
    merge_recording(path, both)
    lost = recording_in(json.loads(path.read_bytes()))["lost"]
    assert [lost[name] for name in names] == [11, 22, 33, 44]


def test_a_trace_that_another_tool_saved_is_merged_again(
    trace: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    path, samples = trace
    styles: list[dict[str, Any]] = [{}, {"indent": 2}, {"separators": (",", ":")}, {"sort_keys": True}]
    for style in styles:
        copy = tmp_path / "saved.json"
        saved = json.loads(path.read_bytes()) | {"my_notes": {"run": [1]}}
        copy.write_text(json.dumps(saved, **style))
        moe_trace.merge_into(copy, samples)
        moe_trace.merge_into(copy, samples)
        again = json.loads(copy.read_bytes())
        assert again["my_notes"] == {"run": [1]} and len(recording_in(again)["samples"]["call"]) == len(
            samples
        )
        ours = [[e.get("pid") == BAND_PID for e in t["traceEvents"]] for t in (saved, again)]
        assert sum(ours[0]) == sum(ours[1]) > 0


def test_merge_into_takes_any_trace_of_torch(tmp_path: Path) -> None:
    """Formats differ between torch releases and between its two exporters; ranges are found in each."""
    model = tiny_olmoe()
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=CPU) as prof,
        moe_trace.MoETracer(model) as tracer,
    ):
        model(**token_batch())
    path = tmp_path / "plain.json"
    prof.export_chrome_trace(str(path))
    compact, pretty, packed = (tmp_path / name for name in ("compact.json", "pretty.json", "packed.json.gz"))
    data = json.loads(path.read_bytes())
    compact.write_text(json.dumps(data, separators=(",", ":")))
    pretty.write_text(json.dumps(data, indent=1))
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for target in (path, compact, pretty, packed):
        moe_trace.merge_into(target, tracer.samples())
        text = target.read_bytes()
        merged = json.loads(gzip.decompress(text) if target.suffix == ".gz" else text)
        assert recording_in(merged)["lost"]["samples_without_range"] == 0
        lanes = [e for e in merged["traceEvents"] if e.get("pid") == BAND_PID and e["ph"] == "X"]
        assert len(lanes) == 6


def test_torchs_own_validator_passes_as_on_the_plain_trace(
    trace: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    validator = pytest.importorskip("torch.profiler._trace_validator")
    path, _ = trace
    plain = tmp_path / "plain.json"
    plain.write_bytes(without_additions(path))
    assert validator.validate_trace(str(path)) == validator.validate_trace(str(plain))
    assert validator.validate_trace(str(path))[0]


def test_schedule_with_repeat_puts_each_call_into_one_trace(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=2)
    cycles: list[Path] = []

    def export(prof: Any) -> None:
        cycles.append(tmp_path / f"{len(cycles)}.json")
        prof.export_chrome_trace(str(cycles[-1]))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=2)
    with torch.no_grad():
        with moe_trace.profile(model, activities=CPU, schedule=schedule, on_trace_ready=export) as prof:
            for _ in range(9):
                model(**token_batch())
                prof.step()
    recorded = [recording_in(json.loads(path.read_bytes())) for path in cycles]
    assert [sorted(set(r["samples"]["step"])) for r in recorded] == [[2, 3], [6, 7]]
    assert [r["lost"]["samples_without_range"] for r in recorded] == [0, 0]
    assert [r["lost"]["ranges_without_sample"] for r in recorded] == [0, 0]
    # Samples outside the recorded steps are had without a profiler's help, and said to be so.
    assert {s.step for s in prof.tracer.samples() if not s.profiled} == {0, 1, 4, 5, 8}


def test_back_to_back_cycles_do_not_share_samples(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=1)
    counts = []

    def export(prof: Any) -> None:
        path = tmp_path / f"{len(counts)}.json"
        prof.export_chrome_trace(str(path))
        counts.append(len(recording_in(json.loads(path.read_bytes()))["samples"]["call"]))

    schedule = torch.profiler.schedule(wait=0, warmup=0, active=1, repeat=3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a schedule without warm-up
        with moe_trace.profile(model, activities=CPU, schedule=schedule, on_trace_ready=export) as prof:
            for _ in range(3):
                model(**token_batch())
                prof.step()
    assert counts == [1, 1, 1]


@pytest.mark.parametrize(("every", "warmup", "steps"), [(2, 0, [0, 2, 4]), (1, 3, [3, 4]), (2, 1, [1, 3])])
def test_every_and_warmup_hold_for_samples_and_ranges(
    tmp_path: Path, every: int, warmup: int, steps: list[int]
) -> None:
    prof = profiled(tiny_olmoe(), steps=5, every=every, warmup=warmup)
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    assert sorted({s.step for s in prof.tracer.samples()}) == steps
    ranges = host_ranges(json.loads(path.read_bytes())["traceEvents"])
    assert {name: len(found) for name, found in ranges.items()} == {
        f"moe.{kind}/L0{i}": len(steps) for kind in ("router", "experts", "block") for i in range(3)
    }


@pytest.mark.parametrize(
    "layers",
    [[1], ["L01"], ["model.layers.1.mlp.gate"], lambda site: site.layer == 1],
    ids=["index", "label", "path", "predicate"],
)
def test_layers_hold_for_samples_and_ranges(tmp_path: Path, layers: Any) -> None:
    prof = profiled(tiny_olmoe(), layers=layers)
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    assert {s.site for s in prof.tracer.samples()} == {"L01"}
    assert set(host_ranges(json.loads(path.read_bytes())["traceEvents"])) == {
        "moe.router/L01",
        "moe.experts/L01",
        "moe.block/L01",
    }


def test_optional_tracks(tmp_path: Path) -> None:
    prof = profiled(tiny_olmoe(layers=1), steps=1, tracks=("layers", "experts"))
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_bytes())["traceEvents"]
    counters = [e for e in events if e.get("pid") == BAND_PID and e["ph"] == "C"]
    assert "L00 load max÷mean" in {c["name"] for c in counters}
    stacked = [c for c in counters if c["name"] == "assignments by expert"]
    sample = prof.tracer.samples()[0]
    assert list(stacked[0]["args"].values()) == sample.assignments.tolist()
    assert set(stacked[1]["args"].values()) == {0}


def test_experts_behind_their_block_are_not_the_calls() -> None:
    """Somebody else may run them, as a test of the experts alone does."""
    sample = _moved(profiled(tiny_olmoe(), steps=1).tracer.samples()[0], start_ns=110_000, thread=7)
    router = RangeEvent("router", sample.site, Span(100.0, 50.0), 1, 7, None, False)
    experts = RangeEvent("experts", sample.site, Span(400.0, 50.0), 1, 7, None, False)
    for block_us, found in ((200.0, {"router", "block"}), (400.0, {"router", "block", "experts"})):
        block = RangeEvent("block", sample.site, Span(90.0, block_us), 1, 7, None, False)
        placed = place_samples([sample], [block, router, experts], base_time_ns=0, window=None)
        placement = placed.samples[0].placement
        assert placement is not None and set(placement.host) == found


def test_device_spans_are_those_of_the_same_external_id() -> None:
    host = RangeEvent("router", "L00", Span(100.0, 50.0), 1, 7, 42, False)
    other = RangeEvent("router", "L00", Span(200.0, 50.0), 1, 7, 43, False)
    on_device = [
        RangeEvent("router", "L00", Span(120.0, 10.0), 0, 7, 42, True),
        RangeEvent("router", "L00", Span(140.0, 20.0), 0, 20, 42, True),
        RangeEvent("router", "L00", Span(130.0, 999.0), 0, 7, 44, True),
    ]
    sample = _moved(profiled(tiny_olmoe(layers=1), steps=1).tracer.samples()[0], start_ns=101_000, thread=7)
    placed = place_samples([sample], [host, other, *on_device], base_time_ns=0, window=None)
    placement = placed.samples[0].placement
    assert placement is not None
    assert placement.device == {"router": Span(120.0, 40.0)}
    assert placed.ranges_without_sample == 1


H200 = sorted((DATA / "h200").glob("*.json.gz"))


@pytest.mark.parametrize("trace_path", H200, ids=lambda p: p.name.split(".")[0])
def test_real_gpu_trace_is_placed_by_external_id(trace_path: Path, tmp_path: Path) -> None:
    """Merge a real H200 trace again, and look every device span up by brute force."""
    from moe_trace.read.reader import read_recording

    path = tmp_path / trace_path.name
    shutil.copy(trace_path, path)
    merged = merge_recording(path, [read_recording(path)])
    assert merged.lost.samples_without_range == merged.lost.ranges_without_sample == 0
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    host = {(e["name"], e["ts"]): e for e in events if e.get("cat") == "user_annotation"}
    device = {e["args"]["External id"]: e for e in events if e.get("cat") == "gpu_user_annotation"}
    lanes = {(e["name"], e["ts"], e["dur"]) for e in events if e.get("pid") == BAND_PID and e["ph"] == "X"}
    assert len(lanes) == 2 * len(merged.placed[0]) > 0
    for sample in merged.placed[0]:
        assert sample.placement is not None
        for kind in ("router", "experts"):
            own = host[f"moe.{kind}/{sample.site}", sample.placement.host[kind].start_us]
            twin = device[own["args"]["External id"]]
            assert sample.placement.device[kind] == Span(twin["ts"], twin["dur"])
            assert (sample.site, twin["ts"], twin["dur"]) in lanes
        spans = [sample.placement.device[kind] for kind in ("router", "experts")]
        block = sample.placement.device["block"]
        assert block.start_us == min(span.start_us for span in spans)
        assert block.end_us == pytest.approx(max(span.end_us for span in spans), abs=1e-3)
