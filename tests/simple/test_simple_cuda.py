"""Tests of the simple interface on a GPU: late reading of events, no synchronisation, and the true shape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from models import tiny_olmoe, token_batch, watch_experts
from moe_trace import MoEProfiler, SimpleBenchmark
from moe_trace.demo import DEMO_PROMPTS, load_demo_model
from moe_trace.routing import (
    confidence_threshold,
    cumulative_mass,
    drop_over_capacity,
    replace_router,
    top_k,
)

pytestmark = pytest.mark.cuda

RULES = [confidence_threshold(0.2), cumulative_mass(0.4), drop_over_capacity(0.8), top_k(1), top_k(4)]


def on_gpu(**sizes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    # grouped_mm wants rows of 16 bytes.
    model = tiny_olmoe(hidden_size=64, intermediate_size=32, **sizes).to("cuda", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    # No attention_mask: transformers itself waits for the device to see whether it masks anything.
    return model, {"input_ids": token_batch(4, 64)["input_ids"].cuda()}


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_between_start_and_stop() -> None:
    model, batch = on_gpu()
    with torch.no_grad():
        model(**batch)
        profiler = MoEProfiler(model)
        profiler.start()
        with synchronising_is_an_error():
            for _ in range(3):
                model(**batch)
        profiler.stop()
    rows = profiler.rows()
    assert len(rows) == 9
    assert all((row.latency_clock, row.device) == ("cuda_event", "cuda:0") for row in rows)
    assert all(0 < row.latency_ms < 1000 and 0 < row.experts_ms < 1000 for row in rows)
    assert all(row.memory_mb > 0 for row in rows)
    summary = next(iter(profiler.get_metrics().values())).get_summary()
    assert summary["memory_max_mb"] >= summary["memory_mean_mb"] > 0


def test_events_tell_the_time_of_the_device() -> None:
    """A router that waits 20 ms on the device takes 20 ms by the event, and hardly any by the host."""
    model, batch = on_gpu(layers=1)
    cycles_per_ms = 1.5e6

    def wait(module: Any, args: Any, output: Any) -> None:
        torch.cuda._sleep(int(20 * cycles_per_ms))

    handle = model.model.layers[0].mlp.gate.register_forward_hook(wait)
    with torch.no_grad(), MoEProfiler(model, warmup=1) as profiler:
        model(**batch)
        torch.cuda.synchronize()
        started = time.perf_counter()
        model(**batch)
        torch.cuda.synchronize()
        whole_ms = 1000 * (time.perf_counter() - started)
    handle.remove()
    (row,) = profiler.rows()
    (sample,) = profiler.tracer.samples()
    assert 10 < row.latency_ms <= whole_ms
    assert (sample.host_end_ns - sample.host_start_ns) / 1e6 < row.latency_ms / 2
    assert row.experts_ms < row.latency_ms


@pytest.mark.parametrize("rule", RULES)
def test_ready_made_rules_do_not_wait(rule: Any) -> None:
    model, batch = on_gpu(top_k=2)
    with torch.no_grad(), replace_router(model, rule, renormalise="original"):
        model(**batch)
        with synchronising_is_an_error():
            model(**batch)
        with watch_experts(model) as calls, MoEProfiler(model) as profiler:
            model(**batch)
    for call, row, sample in zip(calls, profiler.rows(), profiler.tracer.samples(), strict=True):
        assert row.k_avg == sum(call.assignments(8)) / len(call.index)
        assert sample.assignments.tolist() == call.assignments(8)


def test_benchmark_restores_the_bits_on_the_device() -> None:
    model, tokenizer = load_demo_model("cuda", torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.named_parameters()}

    def ruin(model: Any) -> None:
        model.float()
        for parameter in model.parameters():
            parameter.data.mul_(0)

    benchmark = SimpleBenchmark(model, tokenizer, repeats=2, progress=False)
    benchmark.run_config("as trained", DEMO_PROMPTS)
    benchmark.run_config("ruined", DEMO_PROMPTS, ruin)
    benchmark.run_config("one", DEMO_PROMPTS, lambda m: replace_router(m, top_k(1)))
    table = benchmark.compare()
    print(table)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places
    assert table["k_mean"] == [4, 4, 1] and all(ms > 0 for ms in table["router_ms"])


def test_the_guides_block_on_the_true_shape(tmp_path: Path) -> None:
    config = OlmoeConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        vocab_size=50304,
    )
    with torch.device("cuda"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16).eval()
    inputs = {"input_ids": torch.randint(3, 50000, (4, 512), device="cuda")}
    profiler = MoEProfiler(model, warmup=1)
    with watch_experts(model) as calls:
        profiler.start()
        with torch.no_grad():
            model(**inputs)
            model(**inputs)
        profiler.stop()
    profiler.print_summary()
    profiler.save_csv(tmp_path / "olmoe_metrics.csv")
    metrics = profiler.get_metrics()
    assert list(metrics) == [f"model.layers.{i}.mlp.gate" for i in range(16)]
    for call, router in zip(calls[16:], metrics.values(), strict=True):
        summary = router.get_summary()
        assert list(router.samples[0].assignments) == call.assignments(64)
        assert summary["flops_expert_mean"] == 2 * 3 * 2048 * 1024 * 8
        assert summary["flops_router_mean"] == 2 * 2048 * 64
        assert summary["total_tokens"] == 2048 and 0 < summary["latency_p50_ms"] < 1000
