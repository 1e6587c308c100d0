"""Tests that each reason why a trace lacks a recorded call names a remedy that works."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import moe_trace
from models import tiny_olmoe, token_batch
from moe_trace.data.schema import Lost
from moe_trace.timeline.correlate import reasons
from paths import ROOT

CPU = [ProfilerActivity.CPU]
HERE = {"OTHER_THREAD", "NO_ANNOTATIONS", "DROPPED", "NO_RANGE"}
TESTED_ELSEWHERE = {
    **dict.fromkeys(("NO_CPU", "NO_HOST_EVENTS"), "timeline/test_activities.py"),
    **dict.fromkeys(("NO_LAUNCH", "UNKNOWN_GRAPH", "OTHER_COUNT", "NO_MARK"), "record/test_cuda_remedies.py"),
    **dict.fromkeys(("OTHER_STREAM", "MIXED"), "record/test_cuda_remedies.py"),
}
NOTHING_TO_DO = {"FUSED", "OTHER_TRACE", "UNKNOWN_NODES"}


def forwards(model: nn.Module, count: int = 3) -> None:
    with torch.no_grad():
        for seed in range(count):
            model(**token_batch(2, 3, seed=seed))


def whole(lost: Lost) -> bool:
    """Whether every call is in the trace, and every range of the trace has its call."""
    return not (
        lost.without_range or lost.samples_without_range or lost.ranges_without_sample or lost.unplaced
    )


def test_a_thread_that_the_profiler_does_not_record(tmp_path: Path) -> None:
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)

    def lost(**options: Any) -> Lost:
        model = tiny_olmoe(layers=2)
        with moe_trace.profile(model, activities=CPU, **options) as prof:
            thread = threading.Thread(target=forwards, args=(model,))
            thread.start()
            thread.join()
        prof.export_chrome_trace(str(tmp_path / "trace.json"))
        return prof.tracer.recording().lost

    assert lost().without_range == {reasons.OTHER_THREAD: 6}
    assert whole(lost(experimental_config=every_thread))


@pytest.mark.parametrize("way", ["annotations", "some of them"])
def test_a_tool_took_ranges_out_of_the_trace(tmp_path: Path, way: str) -> None:
    model, path = tiny_olmoe(layers=2), tmp_path / "trace.json"
    with moe_trace.MoETracer(model) as tracer, profile(activities=CPU) as prof:
        forwards(model)
    prof.export_chrome_trace(str(path))
    written = path.read_bytes()
    trace = json.loads(written)
    taken = "moe." if way == "annotations" else "moe.router/L01"
    trace["traceEvents"] = [e for e in trace["traceEvents"] if not e.get("name", "").startswith(taken)]
    path.write_text(json.dumps(trace))
    tracer.merge_into(path)
    expected = reasons.NO_ANNOTATIONS if way == "annotations" else reasons.DROPPED
    lost = tracer.recording().lost
    assert lost.without_range.keys() == {expected} and "as the profiler wrote it" in expected
    path.write_bytes(written)
    tracer.merge_into(path)
    assert whole(tracer.recording().lost)


def test_ranges_whose_decisions_were_dropped(tmp_path: Path) -> None:
    def traced(**options: Any) -> Any:
        model = tiny_olmoe(layers=2)
        with moe_trace.profile(model, activities=CPU, **options) as prof:
            forwards(model)
        prof.export_chrome_trace(str(tmp_path / "trace.json"))
        return prof.tracer

    tracer = traced(capacity=2)
    assert tracer.recording().lost.ranges_without_sample == 4
    assert "raise capacity=" in " ".join(tracer.summary().notes)
    assert whole(traced(capacity=6).recording().lost)


def test_code_that_is_compiled_while_the_profiler_records(tmp_path: Path) -> None:
    def lost(**options: Any) -> Lost:
        torch._dynamo.reset()
        model = tiny_olmoe(layers=2)
        with moe_trace.profile(model, activities=CPU, **options) as prof:
            for layer in model.model.layers:
                layer.compile(backend="eager")
            for _ in range(3):
                forwards(model, 1)
                prof.step()
        prof.export_chrome_trace(str(tmp_path / "trace.json"))
        return prof.tracer.recording().lost

    assert lost().unplaced.keys() == {reasons.NO_RANGE}
    assert whole(lost(schedule=torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1)))
    torch._dynamo.reset()


def test_every_reason_is_in_one_of_these_lists() -> None:
    found = {name for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    assert found == HERE | TESTED_ELSEWHERE.keys() | NOTHING_TO_DO
    for name, file in TESTED_ELSEWHERE.items():
        assert f"reasons.{name}" in (ROOT / "tests" / file).read_text("utf-8")
