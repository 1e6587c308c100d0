"""Tests of `MoEProfiler`: every metric against numpy on what the experts received, and unusual uses."""

from __future__ import annotations

import csv
import gc
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.data.errors import NothingRecorded, UsageError
from moe_trace.demo import DEMO_PROMPTS, load_demo_model
from moe_trace.simple.metrics import COLUMNS, RouterMetrics
from moe_trace.simple.profiler import MoEProfiler

SUMMARY_KEYS = (
    "flops_total_mean",
    "flops_total_std",
    "flops_total_p50",
    "flops_total_p95",
    "flops_total_p99",
    "flops_router_mean",
    "flops_expert_mean",
    "flops_total",
    "flops_router",
    "flops_expert",
    "latency_mean_ms",
    "latency_std_ms",
    "latency_min_ms",
    "latency_max_ms",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
    "active_experts_mean",
    "active_experts_std",
    "k_mean",
    "k_std",
    "k_min",
    "k_max",
    "expert_load_mean",
    "expert_load_std",
    "expert_load_cv",
    "expert_load_gini",
    "expert_load_entropy",
    "router_confidence_mean",
    "router_confidence_std",
    "memory_mean_mb",
    "memory_max_mb",
    "total_steps",
    "total_tokens",
)
CSV_COLUMNS = [
    "step",
    "layer",
    "name",
    "tokens",
    "flops_total",
    "flops_router",
    "flops_expert",
    "active_experts",
    "k_avg",
    "latency_ms",
    "router_conf",
    "load_max_over_mean",
    "memory_mb",
    "timestamp",
    "device",
]


def forward(model: Any, *batches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch).logits for batch in batches or (token_batch(),)]


def skip_some(logits: Any, weights: Any, index: Any, hidden: Any) -> Any:
    """A k that differs by token: tokens whose first expert is even lose their last slot."""
    index = torch.where(
        (index[:, :1] % 2 == 0) & (torch.arange(index.shape[1]) == index.shape[1] - 1), -1, index
    )
    return weights, index


class Oracle:
    """The definitions, in float64 numpy, over what one layer's experts really received."""

    def __init__(self, model: Any, layer: int, calls: list[Any], logits: list[np.ndarray]) -> None:
        mlp = model.model.layers[layer].mlp
        self.experts = mlp.gate.weight.shape[0]
        self.calls = [call for call in calls if call.layer == layer]
        self.logits = logits
        gate_and_up, down = mlp.experts.gate_up_proj[0], mlp.experts.down_proj[0]
        hidden, inner = down.shape
        assert gate_and_up.shape == (2 * inner, hidden), "gate, up and down: three matrices an expert"
        self.flops_of_a_slot = 2 * 3 * hidden * inner
        self.flops_of_routing = 2 * hidden * self.experts

    def expected(self) -> dict[str, float]:
        tokens = np.array([len(c.index) for c in self.calls])
        used = [c.weights != 0 for c in self.calls]
        counts = np.array(
            [np.bincount(c.index[u], minlength=self.experts) for c, u in zip(self.calls, used, strict=True)]
        )
        k_N = np.concatenate([u.sum(-1) for u in used])
        expert = np.array([self.flops_of_a_slot * c.index.size / len(c.index) for c in self.calls])
        total = expert + self.flops_of_routing
        load = counts.sum(0)
        confidence_N = np.concatenate([self.confidence(x) for x in self.logits])
        call_means = np.repeat([self.confidence(x).mean() for x in self.logits], tokens)
        shares = load / load.sum()
        pairs = np.abs(load[:, None] - load[None, :]).sum()
        return {
            "flops_total_mean": total.mean(),
            "flops_total_std": total.std(),
            "flops_total_p50": np.percentile(total, 50),
            "flops_total_p95": np.percentile(total, 95),
            "flops_total_p99": np.percentile(total, 99),
            "flops_router_mean": self.flops_of_routing,
            "flops_expert_mean": expert.mean(),
            "flops_total": (total * tokens).sum(),
            "flops_router": self.flops_of_routing * tokens.sum(),
            "flops_expert": (expert * tokens).sum(),
            "active_experts_mean": (counts > 0).sum(-1).mean(),
            "active_experts_std": (counts > 0).sum(-1).std(),
            "k_mean": k_N.mean(),
            "k_std": k_N.std(),
            "k_min": k_N.min(),
            "k_max": k_N.max(),
            "expert_load_mean": load.mean(),
            "expert_load_std": load.std(),
            "expert_load_cv": load.std() / load.mean(),
            "expert_load_gini": pairs / (2 * self.experts**2 * load.mean()),
            "expert_load_entropy": -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
            / np.log(self.experts),
            "router_confidence_mean": confidence_N.mean(),
            "router_confidence_std": call_means.std(),
            "total_steps": len(self.calls),
            "total_tokens": tokens.sum(),
        }

    def confidence(self, logits_TE: np.ndarray) -> np.ndarray:
        p = np.exp(logits_TE.astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        return 1 + (p * np.log(p)).sum(-1) / math.log(self.experts)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_summary_key_against_numpy(implementation: str) -> None:
    model = tiny_olmoe(top_k=3)
    model.set_experts_implementation(implementation)
    batches = [token_batch(2, 12), token_batch(1, 5, seed=4), token_batch(3, 1, seed=5)]
    profiler = MoEProfiler(model)
    logits: list[Any] = []
    with torch.no_grad(), moe_trace.replace_router(model, skip_some), watch_experts(model) as calls, profiler:
        for batch in batches:
            logits.append(model(**batch, output_router_logits=True).router_logits)
    for layer, (name, metrics) in enumerate(profiler.get_metrics().items()):
        assert name == f"model.layers.{layer}.mlp.gate"
        oracle = Oracle(model, layer, calls, [step[layer].numpy() for step in logits]).expected()
        found = metrics.get_summary()
        times = {k: v for k, v in found.items() if k.startswith("latency_")}
        assert set(oracle) | set(times) | {"memory_mean_mb", "memory_max_mb"} == set(SUMMARY_KEYS)
        for key, value in oracle.items():
            assert found[key] == pytest.approx(value, rel=2e-6, abs=1e-12), key
        latency = np.array([row.latency_ms for row in metrics.rows])
        assert len(latency) == 3 and (latency > 0).all()
        for key, value in {
            "latency_mean_ms": latency.mean(),
            "latency_std_ms": latency.std(),
            "latency_min_ms": latency.min(),
            "latency_max_ms": latency.max(),
            "latency_p50_ms": np.percentile(latency, 50),
            "latency_p95_ms": np.percentile(latency, 95),
            "latency_p99_ms": np.percentile(latency, 99),
        }.items():
            assert times[key] == pytest.approx(value), key
        assert math.isnan(found["memory_mean_mb"]) and math.isnan(found["memory_max_mb"])


def test_the_summary_holds_the_keys_in_order_and_only_numbers() -> None:
    model = tiny_olmoe()
    with MoEProfiler(model, layers=[0]) as profiler:
        forward(model)
    for summary in (profiler.get_metrics()["model.layers.0.mlp.gate"].get_summary(), empty_summary()):
        assert tuple(summary) == SUMMARY_KEYS
        assert all(type(value) in (int, float) for value in summary.values())


def empty_summary() -> dict[str, float]:
    (info,) = (site.info for site in moe_trace.find_routers(tiny_olmoe(layers=1)))
    return RouterMetrics(info, (), ()).get_summary()


def test_a_router_without_calls_has_no_figures_that_look_measured() -> None:
    summary = empty_summary()
    counts = {"flops_total", "flops_router", "flops_expert", "total_steps", "total_tokens"}
    assert {key for key, value in summary.items() if value == 0} == counts
    assert all(math.isnan(value) for key, value in summary.items() if key not in counts)


def test_values_are_those_of_the_tracer() -> None:
    model = tiny_olmoe(top_k=3)
    tracer, profiler = moe_trace.MoETracer(model), MoEProfiler(model)
    with tracer, profiler:
        forward(model, token_batch(), token_batch(1, 5))
    by_name = {router.info.name: router for router in tracer.summary().routers}
    own = {router.info.name: router for router in profiler.tracer.summary().routers}
    for name, metrics in profiler.get_metrics().items():
        found, router = metrics.get_summary(), by_name[name]
        assert found["expert_load_cv"] == router.load.cv
        assert found["expert_load_gini"] == router.load.gini
        assert found["expert_load_entropy"] == router.load.entropy
        assert found["router_confidence_mean"] == pytest.approx(router.decisions.confidence_mean)
        assert found["k_mean"] == router.decisions.k_mean
        assert (found["flops_router"], found["flops_expert"]) == (router.flops.router, router.flops.experts)
        assert found["total_tokens"] == router.tokens
        host = own[name].latency.host
        assert host is not None
        assert found["latency_mean_ms"] == pytest.approx(host.mean / 1000)
        assert found["latency_p95_ms"] == pytest.approx(host.p95 / 1000)
    for row, sample in zip(profiler.rows(), profiler.tracer.samples(), strict=True):
        assert (row.step, row.layer, row.name, row.tokens) == (
            sample.step,
            sample.layer,
            sample.name,
            sample.tokens,
        )
        assert row.latency_ms == pytest.approx((sample.host_end_ns - sample.host_start_ns) / 1e6)
        assert row.timestamp == sample.host_start_ns / 1e9
        assert row.router_conf == sample.confidence


def test_rows_and_csv_columns(tmp_path: Path) -> None:
    model = tiny_olmoe()
    with torch.no_grad(), watch_experts(model) as calls, MoEProfiler(model) as profiler:
        model(**token_batch())
        model(**token_batch(1, 5))
    profiler.save_csv(tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert list(COLUMNS)[: len(CSV_COLUMNS)] == CSV_COLUMNS
    assert [(r["step"], r["layer"]) for r in rows] == [(str(s), str(n)) for s in range(2) for n in range(3)]
    for row, call in zip(rows, calls, strict=True):
        counts = np.array(call.assignments(8))
        assert int(row["active_experts"]) == (counts > 0).sum()
        assert float(row["k_avg"]) == counts.sum() / len(call.index)
        assert float(row["load_max_over_mean"]) == pytest.approx(counts.max() / counts.mean())
        assert int(row["flops_total"]) == int(row["flops_router"]) + int(row["flops_expert"])
        assert int(row["flops_expert"]) == 2 * 3 * 32 * 16 * call.index.size
        assert (row["device"], row["latency_clock"], row["memory_mb"]) == ("cpu", "host", "")
        assert float(row["latency_ms"]) > 0 and float(row["experts_ms"]) > 0
    frame = profiler.to_df()
    assert list(frame.columns) == list(COLUMNS)
    said = frame.attrs["columns"]
    assert said["latency_ms"] == {
        "label": "router ms",
        "unit": "ms",
        "definition": "Of the router, by `latency_clock`.",
    }
    assert all(one["label"] for one in said.values())
    assert frame["flops_total"].tolist() == [int(r["flops_total"]) for r in rows]
    profiler.save_csv(tmp_path / "m.csv")  # replaces the file


def test_without_pandas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    model = tiny_olmoe()
    with MoEProfiler(model) as profiler:
        forward(model)
    profiler.save_csv(tmp_path / "m.csv")
    assert len((tmp_path / "m.csv").read_text().splitlines()) == 1 + 3
    with pytest.raises(UsageError, match="pip install pandas"):
        profiler.to_df()


def test_generate_is_a_step_per_token() -> None:
    model = tiny_olmoe()
    with torch.no_grad(), MoEProfiler(model, layers=[1]) as profiler:
        model.generate(**token_batch(2, 7), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    (metrics,) = profiler.get_metrics().values()
    assert [(row.step, row.tokens) for row in metrics.rows] == [(0, 14), (1, 2), (2, 2), (3, 2)]
    assert metrics.get_summary()["total_steps"] == 4


def test_warmup_and_sampling_by_forward_and_by_hand() -> None:
    model = tiny_olmoe(layers=1)
    with MoEProfiler(model, warmup=1, every=2) as profiler:
        forward(model, *[token_batch()] * 6)
    assert [row.step for row in profiler.rows()] == [1, 3, 5]
    with MoEProfiler(model, warmup=1) as profiler:
        for _ in range(3):
            forward(model, token_batch(), token_batch())
            profiler.step()
    # The forwards before the first `step()` were a step each: 0 and 1. From then on steps are as told.
    assert [row.step for row in profiler.rows()] == [1, 2, 2, 3, 3]


def test_recomputed_calls_cost_time_and_add_no_load() -> None:
    model = tiny_olmoe(layers=1).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    batch = token_batch()
    with MoEProfiler(model) as profiler:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    (metrics,) = profiler.get_metrics().values()
    assert [row.phase for row in metrics.rows] == ["forward", "recompute"]
    summary = metrics.get_summary()
    assert (summary["total_tokens"], summary["expert_load_mean"]) == (24, 24 * 2 / 8)
    assert summary["flops_total"] == 2 * metrics.rows[0].flops_total


# -- life --------------------------------------------------------------------------------------------------


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_bit_equal_with_and_after() -> None:
    model = tiny_olmoe()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    (bare,) = forward(model)
    profiler = MoEProfiler(model)
    profiler.start()
    assert hooks_on(model) > 0
    assert torch.equal(forward(model)[0], bare)
    profiler.stop()
    assert hooks_on(model) == 0
    assert torch.equal(forward(model)[0], bare)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert len(profiler.rows()) == 3, "the forward after stop() was recorded"


def test_start_twice_goes_on_and_says_so() -> None:
    model = tiny_olmoe()
    profiler = MoEProfiler(model)
    profiler.start()
    forward(model)
    hooks = hooks_on(model)
    with pytest.warns(RuntimeWarning, match="goes on"):
        profiler.start()
    assert hooks_on(model) == hooks
    forward(model)
    profiler.stop()
    assert [row.step for row in profiler.rows()] == [0] * 3 + [1] * 3
    assert hooks_on(model) == 0


def test_stop_without_start_and_twice() -> None:
    model = tiny_olmoe()
    profiler = MoEProfiler(model)
    with pytest.warns(RuntimeWarning, match="without start"):
        profiler.stop()
    with profiler:
        forward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profiler.stop()
    assert len(profiler.rows()) == 3


def test_a_second_measurement_adds_to_the_first() -> None:
    model = tiny_olmoe(layers=1)
    profiler = MoEProfiler(model)
    for _ in range(2):
        profiler.start()
        forward(model)
        profiler.stop()
    assert [row.step for row in profiler.rows()] == [0, 1]


@pytest.mark.parametrize("where", ["gate", "experts", ""])
def test_an_exception_in_the_forward(where: str) -> None:
    model = tiny_olmoe()
    module = model.model.layers[1].mlp.get_submodule(where) if where else model.lm_head

    def fail(module: Any, args: Any) -> None:
        raise ZeroDivisionError

    profiler = MoEProfiler(model)
    profiler.start()
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        forward(model)
    handle.remove()
    forward(model)
    profiler.stop()
    assert hooks_on(model) == 0
    whole = [row for row in profiler.rows() if row.step == 1]
    assert [row.layer for row in whole] == [0, 1, 2]
    assert all(row.tokens == 24 for row in profiler.rows())


def test_an_exception_out_of_the_context() -> None:
    model = tiny_olmoe()
    with pytest.raises(KeyboardInterrupt), MoEProfiler(model) as profiler:
        forward(model)
        raise KeyboardInterrupt
    assert hooks_on(model) == 0
    assert len(profiler.rows()) == 3


def test_a_profiler_that_is_dropped_takes_its_hooks_along() -> None:
    model = tiny_olmoe()
    profiler = MoEProfiler(model)
    profiler.start()
    forward(model)
    assert hooks_on(model) > 0
    del profiler
    gc.collect()
    assert hooks_on(model) == 0


def test_two_profilers_on_one_model_do_not_disturb_each_other() -> None:
    model = tiny_olmoe()
    first, second = MoEProfiler(model), MoEProfiler(model, layers=[1])
    first.start()
    forward(model)
    second.start()
    forward(model, token_batch(1, 5))
    first.stop()
    forward(model, token_batch(1, 3))
    second.stop()
    assert [(r.layer, r.tokens) for r in first.rows()] == [(n, t) for t in (24, 5) for n in range(3)]
    assert [(r.layer, r.tokens) for r in second.rows()] == [(1, 5), (1, 3)]
    both = [row.flops_total for row in first.rows() if (row.layer, row.tokens) == (1, 5)]
    assert both == [second.rows()[0].flops_total]
    assert hooks_on(model) == 0


# -- nothing recorded --------------------------------------------------------------------------------------


def printed(profiler: MoEProfiler, capsys: pytest.CaptureFixture[str]) -> str:
    profiler.print_summary()
    return " ".join(capsys.readouterr().out.split())


def test_everything_filtered_says_what_to_change(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tiny_olmoe()
    profiler = MoEProfiler(model, warmup=5)
    with pytest.warns(RuntimeWarning, match="warmup=5"), profiler:
        forward(model, *[token_batch()] * 2)
    text = printed(profiler, capsys)
    assert "found 3 routers in OlmoeForCausalLM, but recorded no call" in text
    assert "warmup=5 and every=1 left out all of the 2 forwards; lower them" in text
    with pytest.raises(NothingRecorded, match="lower them"):
        profiler.save_csv(tmp_path / "m.csv")
    assert not list(tmp_path.iterdir())
    assert profiler.rows() == [] and profiler.to_df().empty


def test_not_run_and_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_olmoe()
    profiler = MoEProfiler(model)
    assert "start() was never called" in printed(profiler, capsys)
    with pytest.warns(RuntimeWarning, match="was not run between start"), profiler:
        pass
    assert "run the very object that was given" in printed(profiler, capsys)


def test_routers_that_a_fused_layer_goes_past(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_olmoe()
    for layer in model.model.layers[1:]:
        layer.mlp.forward = lambda hidden: hidden
    with MoEProfiler(model) as profiler:
        forward(model)
    text = printed(profiler, capsys)
    assert "2 of 3 routers were found but never called" in text
    assert text.count("L00") == 1 and "L01" not in text.split("Notes")[0]
    model.model.layers[0].mlp.forward = lambda hidden: hidden
    with pytest.warns(RuntimeWarning, match="no router module was called"), MoEProfiler(model) as profiler:
        forward(model)
    assert "no router module was called" in printed(profiler, capsys)


def test_a_router_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_olmoe(layers=1)
    router = model.model.layers[0].mlp.gate
    original = router.forward
    router.forward = lambda hidden: (original(hidden)[0].unsqueeze(0), *original(hidden)[1:])
    with (
        pytest.warns(RuntimeWarning, match=r"cannot be read|could not be read"),
        MoEProfiler(model) as profiler,
    ):
        forward(model)
    assert "could not be read" in printed(profiler, capsys)


def test_older_names_of_options_work_and_warn() -> None:
    with pytest.warns(DeprecationWarning, match="sampling_rate= is now every="):
        assert MoEProfiler(tiny_olmoe(), sampling_rate=3).tracer.every == 3
    with pytest.warns(DeprecationWarning, match="warmup_steps= is now warmup="):
        assert MoEProfiler(tiny_olmoe(), warmup_steps=2).tracer.warmup == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every to be a whole number of at least 1, found 0"),
        ({"every": 0.1}, "to record a tenth of the steps, give 10"),
        ({"every": True}, "found True"),
        ({"warmup": -1}, "at least 0, found -1"),
        ({"layers": [7]}, "layers"),
        ({"capacity": 0}, "capacity"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MoEProfiler(tiny_olmoe(), **arguments)


def test_times_beyond_the_capacity_are_dropped_with_their_samples() -> None:
    model = tiny_olmoe(layers=1)
    with MoEProfiler(model, capacity=4) as profiler:
        forward(model, *[token_batch()] * 10)
    rows = profiler.rows()
    assert [row.step for row in rows] == [6, 7, 8, 9]
    assert all(row.experts_ms > 0 for row in rows)
    assert any("6 oldest router calls were dropped" in note for note in profiler.notes())


# -- the demo model ------------------------------------------------------------------------------------------


def test_the_block_of_the_guide_on_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_demo_model()
    inputs = tokenizer(DEMO_PROMPTS["code"], return_tensors="pt")
    with watch_experts(model) as calls:
        profiler = MoEProfiler(model)
        profiler.start()
        with torch.no_grad():
            model(**inputs)
        profiler.stop()
    profiler.print_summary()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert [line[:3] for line in out.splitlines() if line.startswith("L0")] == ["L00", "L01", "L02", "L03"]
    profiler.save_csv(tmp_path / "olmoe_metrics.csv")
    for call, (name, metrics) in zip(calls, profiler.get_metrics().items(), strict=True):
        assert name == f"model.layers.{call.layer}.mlp.gate"
        assert list(metrics.samples[0].assignments) == call.assignments(16)
