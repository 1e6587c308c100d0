"""Tests that forward, recomputed and backward calls are counted separately, each with its own mean.

The reports are checked against a brute-force reading. The numbers of calls are known from the workload.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brute_force import PHASES, Brute
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.read.time.layers import PASSES, LayerPhases, Pass
from moe_trace.show.text import render_text
from paths import DATA

LAYERS = 4
# what is run -> forward calls, recomputed calls, backwards of each layer
RUNS: dict[str, tuple[int, int, int]] = {
    "plain": (1, 0, 1),
    "checkpoint_reentrant": (1, 1, 1),
    "checkpoint": (1, 1, 1),
    "accumulation": (2, 0, 2),
    "accumulation_checkpoint": (2, 2, 2),
    "two_forwards": (2, 0, 2),
    "two_forwards_checkpoint": (2, 2, 2),
    "forward_without_backward": (2, 0, 1),
}


def losses(model: Any, ids: Any) -> Callable[[], Any]:
    return lambda: model(ids, labels=ids).loss


def train(name: str, loss: Callable[[], Any]) -> None:
    if name.startswith("accumulation"):
        for _ in range(2):
            loss().backward()
    elif name.startswith("two_forwards"):
        (loss() + loss()).backward()
    elif name == "forward_without_backward":
        loss()
        loss().backward()
    else:
        loss().backward()


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    import moe_trace
    from moe_trace.demo import load_demo_model

    folder = tmp_path_factory.mktemp("passes")
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    for name in RUNS:
        model, _ = load_demo_model()
        model.train()
        if "checkpoint" in name:
            model.gradient_checkpointing_enable({"use_reentrant": name == "checkpoint_reentrant"})
            model.get_input_embeddings().weight.requires_grad_(True)
        with moe_trace.profile(model, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
            train(name, losses(model, ids))
        prof.export_chrome_trace(str(folder / f"{name}.json"))
    return folder


def added_up(path: Path) -> dict[str, dict[Pass, tuple[int, dict[str, int]]]]:
    """Layer -> pass -> how many calls, and nanoseconds of each phase; by brute force."""
    brute, recording = Brute(path), read_recording(path)
    passes = {(s.name, s.call): s.phase for s in recording.samples}
    on_device = bool(brute.kernels)
    found: dict[str, dict[Pass, tuple[int, dict[str, int]]]] = defaultdict(dict)

    def add(site: str, part: Pass, times: dict[str, int]) -> None:
        count, sums = found[site].get(part, (0, dict.fromkeys(PHASES, 0)))
        found[site][part] = count + 1, {phase: sums[phase] + times[phase] for phase in PHASES}

    for call in brute.calls():
        times = brute.times(call)
        part: Pass = "recompute" if passes[call["name"], call["call"]] == "recompute" else "forward"
        add(call["site"], part, times["busy" if on_device else "host"])
        if any(times["backward"]["host"].values()):
            add(call["site"], "backward", times["backward"]["busy" if on_device else "host"])
    return found


def check_report(summary: TraceSummary, truth: dict[str, dict[Pass, tuple[int, dict[str, int]]]]) -> None:
    report = summary.phases
    assert report is not None and {layer.site for layer in report.layers} == set(truth)
    for layer in report.layers:
        for part in PASSES:
            check_layer(layer, part, *truth[layer.site].get(part, (0, {})), on_device=report.whole.on_device)
    check_text(render_text(summary), truth)


def check_layer(
    layer: LayerPhases, part: Pass, count: int, times: dict[str, int], *, on_device: bool
) -> None:
    assert layer.count(part) == count, (layer.site, part)
    phases = layer.phases_of(part)
    assert (phases is None) == (not times) or not any(times.values())
    for name, phase in (phases or {}).items():
        us = phase.device_busy_us if on_device else phase.host_us
        assert us == pytest.approx(times[name] / 1000 if times else 0.0, abs=1e-6), (layer.site, part, name)


def check_text(text: str, truth: dict[str, dict[Pass, tuple[int, dict[str, int]]]]) -> None:
    """Each mean of the printed tables, from the brute force's sums and counts."""
    for part in PASSES:
        counts = {site: of[part][0] for site, of in truth.items() if part in of}
        found = re.search(rf"^Breakdown {part}, .* mean of ([\d,]+) .*\n(.*(?:\n.+)*)", text, re.MULTILINE)
        assert (found is not None) == bool(counts), part
        if found is None:
            continue
        assert int(found[1].replace(",", "")) == sum(counts.values())
        heading, *lines = (re.split(r" {2,}", line.strip()) for line in found[2].splitlines())
        rows = {line[0]: dict(zip(heading[1:], line[1:], strict=False)) for line in lines}
        for site, of in truth.items():
            count, times = of[part]
            for name in set(heading) & set(PHASES):
                printed(rows[site][name], times[name] / 1000 / count)
        for name in set(heading) & set(PHASES):
            total = sum(of[part][1][name] for of in truth.values()) / 1000
            printed(rows["all"][name], total / sum(counts.values()))
            printed(rows["total ms"][name], total / 1000)


def printed(cell: str, value: float) -> None:
    """A cell of three digits shows the value."""
    assert float(cell.replace(",", "")) == pytest.approx(value, rel=6e-3, abs=0.51 if value >= 100 else 1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_each_pass_is_divided_by_its_own_calls(traces: Path, name: str) -> None:
    path = traces / f"{name}.json"
    summary, truth = read_summary(path), added_up(path)
    forward, again, backwards = RUNS[name]
    for layer in truth.values():
        assert {part: layer[part][0] for part in layer} == {
            part: n for part, n in (("forward", forward), ("recompute", again), ("backward", backwards)) if n
        }
    check_report(summary, truth)
    assert summary.totals.calls == LAYERS * forward and summary.totals.recomputed_calls == LAYERS * again
    text = render_text(summary)
    assert ("recompute" in text) == bool(again)
    for router in summary.routers:
        assert router.latency.host is not None
        assert (router.recompute_latency.host is not None) == bool(again)
        assert router.flops.recomputed * (forward + again) == router.flops.total * again


GPU = (
    "h200/train_grouped_mm",
    "h200/prefill_grouped_mm",
    "h100/train_checkpointed",
    "h100/train_checkpointed_reentrant",
)


@pytest.mark.parametrize("name", GPU)
def test_on_a_gpu(name: str) -> None:
    path = DATA / f"{name}.pt.trace.json.gz"
    check_report(read_summary(path), added_up(path))


def test_what_ran_again_is_not_in_the_backward_too() -> None:
    """Both kinds of checkpointing have one backward, though one runs the forward inside a node of it."""
    work = {}
    for name in GPU[2:]:
        report = read_summary(DATA / f"{name}.pt.trace.json.gz").phases
        assert report is not None and report.total.backward is not None
        work[name] = {p: t.device_busy_us or 0.0 for p, t in report.total.backward.items()}
        assert report.total.recompute is not None and report.total.recompute.calls == 4
        assert report.total.calls == report.total.backwards == 4
    inside, reentrant = work.values()
    for phase in ("router", "dispatch", "experts", "combine"):
        assert inside[phase] == pytest.approx(reentrant[phase], rel=0.1), phase


def test_a_backward_is_not_halved_by_checkpointing(traces: Path) -> None:
    """The same backward with and without checkpointing: one a layer, whatever was recomputed."""
    for name in ("plain", "checkpoint", "checkpoint_reentrant"):
        report = read_summary(traces / f"{name}.json").phases
        assert report is not None and report.total.backwards == LAYERS
