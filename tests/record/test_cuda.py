"""Tests that need a GPU: no synchronisation, device spans, true counts in bfloat16."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.data.schema import BAND_PID
from spliced import recording_in

pytestmark = pytest.mark.cuda

BOTH = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def on_gpu(implementation: str = "grouped_mm", **sizes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    # grouped_mm wants rows of 16 bytes.
    model = tiny_olmoe(hidden_size=64, intermediate_size=32, **sizes).to("cuda", torch.bfloat16)
    model.set_experts_implementation(implementation)
    return model, {name: value.cuda() for name, value in token_batch(4, 64).items()}


def forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model(**batch)


def decode(model: Any, batch: dict[str, torch.Tensor]) -> None:
    cache = model(**batch).past_key_values
    for _ in range(3):
        model(batch["input_ids"][:, :1], past_key_values=cache)


def generate(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def repeat(times: int, work: Callable[[], None]) -> None:
    for _ in range(times):
        work()


def synchronisations(work: Callable[[], None]) -> int:
    """How often torch itself saw a synchronising call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.parametrize("work", [forward, decode, generate])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@torch.no_grad()
def test_tracer_adds_no_synchronisation(work: Callable[..., None], implementation: str) -> None:
    """Eager experts and generate() synchronise on their own, so the counts are compared."""
    model, batch = on_gpu(implementation)
    work(model, batch)
    bare = synchronisations(lambda: work(model, batch))
    with moe_trace.MoETracer(model):
        work(model, batch)
        traced = synchronisations(lambda: repeat(40, lambda: work(model, batch)))
    assert traced == 40 * bare
    with moe_trace.profile(model, activities=BOTH):
        work(model, batch)
        profiled = synchronisations(lambda: work(model, batch))
    assert profiled == bare


@torch.no_grad()
def test_hooked_forward_runs_where_synchronising_is_an_error() -> None:
    model, batch = on_gpu()
    del batch["attention_mask"]  # transformers looks into a mask, which waits for the device
    forward(model, batch)
    for context in (moe_trace.MoETracer(model), moe_trace.profile(model, activities=BOTH)):
        with context:
            forward(model, batch)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(40):  # more than one batch is shipped to the host
                    forward(model, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_training_step_adds_no_synchronisation() -> None:
    model, batch = on_gpu()
    model.train()

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()

    step()
    bare = synchronisations(step)
    with moe_trace.MoETracer(model):
        step()
        assert synchronisations(step) == bare


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_assignments_on_the_gpu_equal_what_the_experts_received(implementation: str) -> None:
    model, batch = on_gpu(implementation, experts=64, top_k=8)
    with watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        for _ in range(40):
            forward(model, batch)
    samples = tracer.samples()
    assert [s.assignments.tolist() for s in samples] == [c.assignments(64) for c in calls]
    assert all(s.memory_allocated_bytes > 0 for s in samples)


@torch.no_grad()
def test_device_spans_are_the_annotations_of_the_same_external_id(tmp_path: Path) -> None:
    model, batch = on_gpu()
    forward(model, batch)
    with moe_trace.profile(model, activities=BOTH) as prof:
        for _ in range(2):
            forward(model, batch)
    path = tmp_path / "trace.json.gz"
    prof.export_chrome_trace(str(path))
    data = json.loads(gzip.decompress(path.read_bytes()))
    assert recording_in(data)["lost"]["samples_without_range"] == 0
    events = data["traceEvents"]
    on_host = [e for e in events if e.get("cat") == "user_annotation"]
    on_device = {e["args"]["External id"]: e for e in events if e.get("cat") == "gpu_user_annotation"}
    for sample in prof.tracer.samples():
        assert sample.placement.device["block"].start_us == sample.placement.device["router"].start_us
        for kind in ("router", "experts"):
            host = sample.placement.host[kind]
            event = next(
                e for e in on_host if e["ts"] == host.start_us and e["name"] == f"moe.{kind}/{sample.site}"
            )
            expected = on_device[event["args"]["External id"]]
            span = sample.placement.device[kind]
            assert (span.start_us, span.duration_us) == (expected["ts"], expected["dur"])
    lanes = [e for e in events if e.get("pid") == BAND_PID and e["ph"] == "X"]
    assert {(e["ts"], e["dur"]) for e in lanes} <= {(e["ts"], e["dur"]) for e in on_device.values()}
    assert {e["args"]["clock"] for e in lanes} == {"device"}


@torch.no_grad()
def test_no_stream_is_waited_for_inside_a_range(tmp_path: Path) -> None:
    model, batch = on_gpu()
    forward(model, batch)
    with moe_trace.profile(model, activities=BOTH) as prof:
        forward(model, batch)
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_bytes())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("moe")]
    # Beside them stand ranges of our own device work, as many as there is: a reduction may wait.
    assert len([e for e in ranges if e["name"].startswith("moe.")]) == 9
    waits = [e for e in events if "Synchronize" in e.get("name", "")]
    for wait in waits:
        assert not any(r["ts"] <= wait["ts"] <= r["ts"] + r["dur"] for r in ranges)


def test_logits_are_bit_equal_on_the_gpu() -> None:
    model, batch = on_gpu()
    with torch.no_grad():
        bare = model(**batch).logits
        with moe_trace.MoETracer(model):
            assert torch.equal(model(**batch).logits, bare)


def test_a_choice_that_is_written_over_in_inference_mode_is_copied_without_waiting() -> None:
    """What has no version is held against its copies on the device, whose answer nobody waits for."""
    model, batch = on_gpu(layers=2)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda m, args, out: (args[1].zero_(), None)[1])
    with torch.inference_mode(), watch_experts(model) as calls:
        model(**batch)
    expected = [c.assignments(8) for c in calls]
    with torch.inference_mode():
        bare = synchronisations(lambda: repeat(20, lambda: forward(model, batch)))
        with moe_trace.MoETracer(model) as tracer:
            assert synchronisations(lambda: repeat(20, lambda: forward(model, batch))) == bare
    assert [s.assignments.tolist() for s in tracer.samples()] == expected * 20
    assert not tracer.recording().lost.calls
