"""Compiled code on the timeline, end to end on a CPU: range, placement, band and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_trace
from compiled_models import WAYS, run, small_model
from models import token_batch
from moe_trace.read.check import check, read_checked
from moe_trace.read.file.trace_file import read_trace
from moe_trace.timeline.correlate import reasons
from spliced import without_additions

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPE = [(2, 12)]


@pytest.fixture(scope="module", autouse=True)
def warm_inductor() -> None:
    """Inductor keeps a thread for the whole process from its first compilation on."""
    torch.compile(lambda x: x.sin().sum())(torch.ones(64))


def profiled(model: Any, forward: Any, path: Path, steps: int = 3) -> moe_trace.MoETracer:
    """Compile in one step that no profiler records, then record some."""
    tracer = moe_trace.MoETracer(model)
    with tracer:
        run(forward, SHAPE)
        with torch.profiler.profile() as prof:
            tracer.attach(prof)
            for _ in range(steps):
                run(forward, SHAPE)
                prof.step()
        prof.export_chrome_trace(str(path))
    return tracer


def events_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_bytes())["traceEvents"]


def ranges(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("moe.")]


@pytest.mark.parametrize("way", WAYS)
def test_compiled_calls_stand_at_the_forward_that_made_them(way: str, tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "trace.json"
    tracer = profiled(model, WAYS[way](model, backend="aot_eager"), path)
    events = events_of(path)
    assert [e["name"] for e in ranges(events)] == ["moe.graph/OlmoeForCausalLM"] * 3
    placed = [s for s in tracer.samples() if s.placement is not None]
    assert [(s.step, s.site) for s in placed] == [
        (step, site) for step in range(3) for site in ("L00", "L01")
    ]
    for sample in placed:
        own = ranges(events)[sample.step]
        assert sample.placement.host["graph"].start_us == own["ts"]
        assert sample.placement.host["graph"].duration_us == own["dur"]
        assert sample.placement.host.keys() == {"graph"} and sample.placement.device == {}
    lost = tracer.recording().lost
    assert (lost.untimed, lost.unplaced, lost.samples_without_range) == ({reasons.FUSED: 6}, {}, 0)
    assert {rule: broken for rule, broken in check(read_checked(path)).items() if broken} == {}
    slices = [e for e in events if e.get("cat") == "moe_trace"]
    assert [(e["name"], e["args"]["step"], e["args"]["clock"]) for e in slices] == [
        ("graph", step, "host") for step in range(3)
    ]


def test_inductor_code_is_placed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_trace.cli import main

    model, path = small_model(), tmp_path / "trace.json"
    profiled(model, torch.compile(model, fullgraph=True), path, steps=1)
    assert len(ranges(events_of(path))) == 1
    assert main(["check", str(path)]) == 0
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 have a place in the trace, that of their graph or forward, and 0 a time of the router" in text
    assert "2 calls have no router latency: compiled code fuses the router with its neighbours" in text


def test_the_trace_round_our_additions_is_what_the_profiler_wrote(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "trace.json"
    tracer = profiled(model, torch.compile(model, backend="aot_eager"), path)
    plain = without_additions(path)
    assert "moe_trace" not in json.loads(plain)
    again = tmp_path / "again.json"
    again.write_bytes(plain)
    moe_trace.merge_into(again, tracer.samples())
    assert [e for e in events_of(again) if e.get("cat") == "moe_trace"] == [
        e for e in events_of(path) if e.get("cat") == "moe_trace"
    ]


def test_a_forward_that_the_host_does_not_see_has_no_place_on_a_cpu(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "trace.json"

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(**batch: Any) -> Any:
        return model(**batch).logits

    tracer = profiled(model, function, path)
    assert ranges(events_of(path)) == []
    samples = [s for s in tracer.exported_samples if s.layer == 0]
    assert [s.placement for s in samples] == [None] * 3
    first = samples[0].graph_forward
    assert first is not None
    assert [s.graph_forward for s in samples] == [first, first + 1, first + 2]
    marks = tracer.recording().graph_marks
    assert [mark.forwards for mark in marks] == [first - 1, first, first + 1, first + 2, first + 2]
    assert tracer.recording().lost.unplaced == {reasons.NO_LAUNCH: 6}
    assert {rule: broken for rule, broken in check(read_checked(path)).items() if broken} == {}


def test_each_trace_of_a_schedule_holds_its_own_replays(tmp_path: Path) -> None:
    """What the host does not see has no time; the marks tell which trace it belongs to."""
    model, found = small_model(), []

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(**batch: Any) -> Any:
        return model(**batch).logits

    def ready(prof: Any) -> None:
        prof.export_chrome_trace(str(tmp_path / "trace.json"))
        found.append([s.graph_forward for s in tracer.exported_samples if s.layer == 0])

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=2)
    tracer = moe_trace.MoETracer(model)
    with tracer, torch.profiler.profile(schedule=schedule, on_trace_ready=ready) as prof:
        tracer.attach(prof)
        for _ in range(8):
            run(function, SHAPE)
            prof.step()
    assert found == [[3, 4], [7, 8]]


def test_a_failure_to_time_routers_costs_no_export_its_routing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    model, path = small_model(), tmp_path / "trace.json"
    monkeypatch.setattr("moe_trace.timeline.compiled_spans._joined", fail)
    with moe_trace.MoETracer(model):
        forward = torch.compile(model, backend="aot_eager")
        run(forward, SHAPE)
        with torch.profiler.profile() as prof:
            run(forward, SHAPE)
        with pytest.warns(RuntimeWarning, match="lanes .* could not be made .MemoryError"):
            prof.export_chrome_trace(str(path))
    recording = read_trace(path).recording
    assert len(recording.samples) == 2 and recording.calls.places.placed.all()
    assert sum(recording.lost.untimed.values()) == 2


def test_what_is_compiled_while_the_profiler_records_has_no_range(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "trace.json"
    forward = torch.compile(model, backend="aot_eager")
    with moe_trace.profile(model) as prof:
        run(forward, SHAPE)
        run(forward, SHAPE)
    prof.export_chrome_trace(str(path))
    assert [s.placement is None for s in prof.tracer.samples()] == [True, True, False, False]
    assert prof.tracer.recording().lost.unplaced == {reasons.NO_RANGE: 2}


def test_an_eager_run_opens_no_range_of_a_graph(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "trace.json"
    with moe_trace.profile(model) as prof:
        run(model, SHAPE)
    prof.export_chrome_trace(str(path))
    assert {e["name"].split("/")[0] for e in ranges(events_of(path))} == {
        "moe.router",
        "moe.experts",
        "moe.block",
    }


def test_a_forward_that_raises_closes_its_range() -> None:
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        model.model.compile(backend="aot_eager")
        run(model, SHAPE)
        with torch.profiler.profile():
            with pytest.raises(TypeError):
                model(**token_batch(2, 12), no_such_argument_of_the_model=1, labels="x")
            assert len(tracer._hooks._ranges) == 0
