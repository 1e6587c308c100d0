"""Tests that prefill, decode and training in one trace are reported as in separate traces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brute_force import load, ns
from moe_trace.data.schema import BAND_PID, METADATA_KEY, Lost, Stage
from moe_trace.read.file.filters import Filter
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.json import to_plain
from moe_trace.timeline.merge import merge_recording
from paths import DATA

H100 = DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
LAUNCHES = ("cuda_runtime", "cuda_driver")


def windows(events: list[dict[str, Any]], stages: Iterable[tuple[int, Stage]]) -> list[tuple[int, int, str]]:
    """Stretches of host time by the stage of their forwards, which begin at `aten::embedding`."""
    begins = sorted(ns(e["ts"]) for e in events if e.get("name") == "aten::embedding" and e["ph"] == "X")
    assert begins, "the model has no embedding"
    found: list[tuple[int, int, str]] = []
    for begin, end in zip([*begins[:1], *begins[1:]], [*begins[1:], 1 << 62], strict=True):
        inside = {stage for time, stage in stages if begin <= time < end}
        assert len(inside) == 1, inside
        found.append((begin if found else -(1 << 62), end, inside.pop()))
    return found


def cut(path: Path, stage: Stage, target: Path) -> Path:
    """The trace of one stage alone: its calls, what the host did in its time, and the kernels of that."""
    trace, recording = load(path), read_recording(path)
    trace.pop(METADATA_KEY, None)
    events = [e for e in trace["traceEvents"] if not (isinstance(e.get("pid"), int) and e["pid"] >= BAND_PID)]
    base = trace.get("baseTimeNanoseconds", 0)
    of_forward = [(s.host_start_ns - base, s.stage) for s in recording.samples if s.phase == "forward"]
    mine = [(start, end) for start, end, one in windows(events, of_forward) if one == stage]

    def inside(event: dict[str, Any]) -> bool:
        return any(start <= ns(event["ts"]) < end for start, end in mine)

    host = [e for e in events if e.get("ph") == "X" and e.get("cat") not in DEVICE]
    launched = {e["args"]["correlation"] for e in host if e.get("cat") in LAUNCHES and inside(e)}
    ranges = {e["args"]["External id"] for e in host if e.get("cat") == "user_annotation" and inside(e)}
    flows = {e["id"] for e in events if e.get("cat") == "fwdbwd" and e["ph"] == "s" and inside(e)}

    def kept(event: dict[str, Any]) -> bool:
        args = event.get("args") or {}
        if event.get("cat") == "gpu_user_annotation":
            return args["External id"] in ranges
        if event.get("cat") in DEVICE or event.get("cat") == "ac2g":
            return args.get("correlation", event.get("id")) in launched
        if event.get("cat") == "fwdbwd":
            return event["id"] in flows
        return event.get("ph") != "X" or inside(event)

    trace["traceEvents"] = [event for event in events if kept(event)]
    target.write_text(json.dumps(trace))
    samples = tuple(replace(s, placement=None) for s in recording.samples if s.stage == stage)
    merge_recording(target, [replace(recording, samples=samples, lost=Lost())])
    return target


def figures(summary: TraceSummary) -> dict[str, Any]:
    plain = to_plain(summary)
    kept = ("routers", "totals", "phases", "speed", "imbalance", "findings", "stage")
    return {key: plain[key] for key in kept}


def compare(path: Path, stages: tuple[Stage, ...], folder: Path) -> None:
    mixed = read_summary(path)
    assert mixed.stage is None and tuple(mixed.stages) == stages
    for stage, part in mixed.by_stage().items():
        alone = read_summary(cut(path, stage, folder / f"{stage}.json"))
        assert alone.stage == stage and not alone.stages and alone.by_stage() == {stage: alone}
        assert figures(part) == figures(alone)
        filtered = read_summary(path, chosen=Filter(stages=frozenset([stage])))
        assert figures(filtered) == figures(part)
        assert part.phases is not None and part.phases.whole.moe_share_of_model is not None
    work = [part.phases.whole.model_work_us for part in mixed.stages.values() if part.phases is not None]
    assert mixed.phases is not None
    assert sum(w for w in work if w is not None) == pytest.approx(mixed.phases.whole.model_work_us)


def test_prefill_and_decode_on_a_gpu(tmp_path: Path) -> None:
    compare(H100, ("prefill", "decode"), tmp_path)


@pytest.fixture(scope="module")
def all_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model trains, then generates, within one profile and without `prof.step()`."""
    import torch

    import moe_trace
    from moe_trace.demo import load_demo_model

    model, _ = load_demo_model()
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    with moe_trace.profile(model, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        model.train()
        model(ids, labels=ids).loss.backward()
        model.eval()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    path = tmp_path_factory.mktemp("stages") / "all.json"
    prof.export_chrome_trace(str(path))
    return path


def test_three_stages_on_a_cpu(all_stages: Path, tmp_path: Path) -> None:
    compare(all_stages, ("prefill", "decode", "train"), tmp_path)


def test_steps_keep_the_share_of_the_model(all_stages: Path) -> None:
    """Each step and stage has its share, and the work of all steps is that of the trace."""
    steps = {s.step for s in read_recording(all_stages).samples}
    parts = [read_summary(all_stages, chosen=Filter(steps=frozenset([step]))) for step in steps]
    work = [part.phases.whole.model_work_us for part in parts if part.phases is not None]
    whole = read_summary(all_stages).phases
    assert whole is not None and None not in work
    assert sum(w for w in work if w is not None) == pytest.approx(whole.whole.model_work_us)


def test_without_a_mark_between_forwards_the_share_is_not_known(all_stages: Path, tmp_path: Path) -> None:
    """Other operators than the embedding's begin a forward: nothing is guessed."""
    path = tmp_path / "renamed.json"
    path.write_text(all_stages.read_text().replace("aten::embedding", "aten::other_names"))
    for part in read_summary(path).stages.values():
        assert part.phases is not None and part.phases.whole.moe_share_of_model is None
        assert part.phases.total.forward["experts"].share_of_moe
