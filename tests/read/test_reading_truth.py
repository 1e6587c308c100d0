"""Latencies and phases equal a recomputation by brute force, on real H200 traces and on CPU traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brute_force import PHASES, Brute
from moe_trace.data.summary import Distribution
from moe_trace.read.reader import TraceSummary, read_summary
from moe_trace.read.time import phase_detection as structure
from paths import DATA

H200 = DATA / "h200"
TRACES = (
    "prefill_eager",
    "prefill_grouped_mm",
    "prefill_batched_mm",
    "decode_grouped_mm",
    "train_grouped_mm",
)
CPU = ("eager", "grouped_mm", "batched_mm", "python_export", "train", "checkpoint")


@pytest.fixture(scope="module")
def cpu_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, profiled on this CPU: each implementation of its experts, and a training step."""
    import torch
    from torch.profiler import ProfilerActivity

    import moe_trace
    from moe_trace.demo import load_demo_model

    folder = tmp_path_factory.mktemp("cpu")
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    for name in CPU:
        implementation = name if name in ("eager", "batched_mm") else "grouped_mm"
        model, _ = load_demo_model(experts_implementation=implementation)
        training = name in ("train", "checkpoint")
        model.train(training)
        if name == "checkpoint":
            model.gradient_checkpointing_enable()
        with moe_trace.profile(model, activities=[ProfilerActivity.CPU]) as prof:
            if training:
                model(ids, labels=ids).loss.backward()
            else:
                with torch.no_grad():
                    model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        prof.export_chrome_trace(
            str(folder / f"{name}.json"), **({"use_python_export": True} if name == "python_export" else {})
        )
    return folder


@pytest.mark.parametrize("name", TRACES)
def test_h200_traces_equal_brute_force(name: str) -> None:
    path = H200 / f"{name}.pt.trace.json.gz"
    summary, brute = read_summary(path), Brute(path)
    assert summary.times is not None and summary.times.on_device
    compare_phases(summary, brute)
    compare_latencies(summary, brute)


@pytest.mark.parametrize("name", CPU)
def test_cpu_traces_equal_brute_force(cpu_traces: Path, name: str) -> None:
    path = cpu_traces / f"{name}.json"
    summary, brute = read_summary(path), Brute(path)
    assert summary.times is not None and not summary.times.on_device
    compare_phases(summary, brute)
    compare_latencies(summary, brute)


def compare_latencies(summary: TraceSummary, brute: Brute) -> None:
    """Forward and recomputed calls apart."""
    passes = {(s.name, s.call): s.phase for s in summary.samples}
    values: dict[tuple[str, str], dict[str, list[int]]] = {}
    for call in brute.calls():
        key = call["name"], passes[call["name"], call["call"]]
        of = values.setdefault(key, {"host": [], "device_span": [], "device_busy": []})
        of["host"].append(call["router"].duration)
        span = brute.device_span(call["router"])
        if span is not None:
            of["device_span"].append(span)
            of["device_busy"].append(sum(k.duration for k in brute.launched_in(call["router"])))
    assert {name for name, _ in values} == {router.info.name for router in summary.routers}
    nothing: dict[str, list[int]] = {"host": [], "device_span": [], "device_busy": []}
    for router in summary.routers:
        for part, latency in (("forward", router.latency), ("recompute", router.recompute_latency)):
            for clock, found in values.get((router.info.name, part), nothing).items():
                compare_distribution(getattr(latency, clock), found)


def compare_distribution(distribution: Distribution | None, found: list[int]) -> None:
    if not found:
        assert distribution is None
        return
    array = np.array(found) / 1000
    assert distribution is not None
    assert distribution.total == pytest.approx(array.sum(), abs=1e-6)
    assert distribution.mean == pytest.approx(array.mean(), abs=1e-6)
    assert distribution.std == pytest.approx(array.std(), abs=1e-6)
    assert (distribution.min, distribution.max) == pytest.approx((array.min(), array.max()))
    for q in (50, 95, 99):
        assert getattr(distribution, f"p{q}") == pytest.approx(np.percentile(array, q), abs=1e-6)


def compare_phases(summary: TraceSummary, brute: Brute) -> None:
    times = summary.times
    assert times is not None and structure.PHASES == PHASES
    calls = {(call["name"], call["call"]): call for call in brute.calls()}
    assert {(s.name, s.call) for s in times.samples} == set(calls)
    for row, sample in enumerate(times.samples):
        call = calls[sample.name, sample.call]
        truth = brute.times(call)
        got = {
            "host": times.forward.host_ns[row],
            "busy": times.forward.busy_ns[row],
            "kernels": times.forward.kernels[row],
            "span": times.forward.span_ns[row],
        }
        for figure, values in got.items():
            assert dict(zip(PHASES, values.tolist(), strict=True)) == truth[figure], (sample.site, figure)
        assert times.block_host_ns[row] == call["block"].duration
        assert times.device_span_ns[row] == truth["device_span"]
        assert times.device_gap_ns[row] == truth["device_gap"]
        if times.backward is not None:
            assert (
                dict(zip(PHASES, times.backward.host_ns[row].tolist(), strict=True))
                == truth["backward"]["host"]
            )
            assert (
                dict(zip(PHASES, times.backward.busy_ns[row].tolist(), strict=True))
                == truth["backward"]["busy"]
            )
        else:
            assert not any(truth["backward"]["host"].values())


@pytest.mark.parametrize("name", TRACES)
def test_sums_conserve(name: str) -> None:
    """Phases + gaps = block on the host; phases + gaps - overlap = span on the device; layers = total."""
    summary = read_summary(H200 / f"{name}.pt.trace.json.gz")
    assert summary.phases is not None
    for layer in (*summary.phases.layers, summary.phases.total):
        host = sum(phase.host_us for phase in layer.forward.values())
        assert host + layer.host_gap_us == pytest.approx(layer.block_host_us, abs=1e-3)
        busy = sum(phase.device_busy_us or 0 for phase in layer.forward.values())
        assert layer.device_busy_us == pytest.approx(busy, abs=1e-3)
        assert None not in (layer.device_gap_us, layer.device_overlap_us, layer.device_span_us)
        span = busy + (layer.device_gap_us or 0) - (layer.device_overlap_us or 0)
        assert span == pytest.approx(layer.device_span_us, abs=1e-3)
    total = sum(layer.block_host_us for layer in summary.phases.layers)
    assert summary.phases.total.block_host_us == pytest.approx(total, abs=1e-3)
    assert sum(p.share_of_moe or 0 for p in summary.phases.total.forward.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prefill_eager", {"dispatch", "experts", "combine"}),
        ("prefill_grouped_mm", {"dispatch", "experts", "combine"}),
        ("prefill_batched_mm", {"dispatch", "experts", "combine"}),
    ],
)
def test_what_each_phase_holds(name: str, expected: set[str]) -> None:
    """The brute force shares the rule with the code; the operators tell whether the rule is right."""
    brute = Brute(H200 / f"{name}.pt.trace.json.gz")
    call = brute.calls()[0]
    found: dict[str, set[str]] = {}
    for step, phase in brute.steps(call):
        found.setdefault(phase, set()).add(step.name)
    assert expected <= set(found)
    assert found["experts"] & {"aten::linear", "aten::bmm", "aten::_grouped_mm"}
    assert "aten::silu" in found["experts"]
    assert not found["dispatch"] & {"aten::silu", "aten::linear", "aten::bmm", "aten::_grouped_mm"}
    assert "aten::index" in found["dispatch"]
    assert found["combine"] & {"aten::index_add_", "aten::sum"}
    assert found["router"] >= {"aten::linear", "aten::softmax", "aten::topk"}
