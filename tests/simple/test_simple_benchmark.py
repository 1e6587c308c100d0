"""Tests of `SimpleBenchmark`: its measurements and their order, and that the model is bitwise unchanged."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe_trace.simple.benchmark
from models import tiny_olmoe
from moe_trace.data.errors import NoRoutersFound, NothingRecorded, UsageError
from moe_trace.routing import cumulative_mass, replace_router, top_k
from moe_trace.simple.benchmark import SimpleBenchmark
from moe_trace.simple.comparison import Measurement, compare, interval
from moe_trace.simple.model_state import ModelState


class Bytes:
    """A tokenizer: a byte is a token."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[3 + b % 90 for b in text.encode()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bench(model: Any, **options: Any) -> SimpleBenchmark:
    return SimpleBenchmark(model, Bytes(), **{"repeats": 3, "warmup": 0, "progress": False} | options)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a configuration could change."""
    found: dict[str, Any] = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        found[f"{name}: module"] = id(module)
        found[f"{name}: class"] = type(module)
        found[f"{name}: mode"] = module.training
        found[f"{name}: plain"] = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
        found[f"{name}: hooks"] = {k: dict(v) for k, v in vars(module).items() if "hooks" in k}
        found[f"{name}: forward"] = vars(module).get("forward")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}: bits"] = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found[f"{name}: place"] = (id(value), value.data_ptr(), value.dtype, value.requires_grad)
        found[f"{name}: grad"] = None if value.grad is None else value.grad.clone().numpy().tobytes()
    return found


def prune(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0].zero_()
        model.model.layers[1].mlp.experts.down_proj.data.mul_(2)  # past the version counter


def change_config(model: Any) -> None:
    model.config.num_experts_per_tok = 1
    model.config.rope_parameters["rope_theta"] = 1.0
    model.config.new_attribute = "x"
    model.generation_config.max_new_tokens = 3
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
        layer.mlp.gate.num_experts_tried = 8


def replace_modules(model: Any) -> None:
    layer = model.model.layers[2]
    layer.input_layernorm = nn.Identity()
    layer.register_module("extra", nn.Linear(2, 2))
    del layer.post_attention_layernorm.weight
    layer.post_attention_layernorm.weight = nn.Parameter(torch.zeros(32))
    layer.mlp.gate.forward = type(layer.mlp.gate).forward.__get__(layer.mlp.gate)


def add_hooks(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: None)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0.5, always_call=True)
    model.lm_head.register_full_backward_hook(lambda *args: None)


def change_types(model: Any) -> None:
    model.double().train().requires_grad_(False)
    model.set_experts_implementation("batched_mm")
    for buffer in model.buffers():
        buffer.add_(1e-3)


def enter_a_rule(model: Any) -> Any:
    return replace_router(model, top_k(1))


CHANGES = [prune, change_config, replace_modules, add_hooks, change_types, enter_a_rule]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_configuration_is_undone_bit_for_bit(change: Any) -> None:
    model = tiny_olmoe()
    weight = model.model.layers[0].mlp.gate.weight
    weight.grad = torch.ones_like(weight)
    mine = model.register_forward_hook(lambda module, args, output: None)
    before = fingerprint(model)
    benchmark = bench(model, repeats=2)
    benchmark.run_config("plain", "some text")
    assert fingerprint(model) == before
    benchmark.run_config("changed", "some text", change)
    assert fingerprint(model) == before
    benchmark.compare()
    assert fingerprint(model) == before
    mine.remove()  # a handle of before still finds its hook
    assert not model._forward_hooks


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_each_configuration_does_change_the_model(change: Any) -> None:
    model = tiny_olmoe()
    before = fingerprint(model)
    returned = change(model)
    with returned if returned is not None else contextmanager(lambda: iter([None]))():
        assert fingerprint(model) != before


def test_the_state_of_a_training_model_comes_back_after_an_exception() -> None:
    model = tiny_olmoe().train()
    model.model.layers[1].eval()
    before = fingerprint(model)

    def fail(model: Any) -> None:
        prune(model)
        add_hooks(model)
        raise ZeroDivisionError

    benchmark = bench(model)
    with pytest.raises(ZeroDivisionError):
        benchmark.run_config("fails", "text", fail)
    assert fingerprint(model) == before
    with pytest.raises(UsageError, match="nothing to compare"):
        benchmark.compare()


def test_weights_that_change_between_runs_are_not_taken_back() -> None:
    model = tiny_olmoe()
    benchmark = bench(model, repeats=1)
    benchmark.run_config("before", "text", prune)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    trained = fingerprint(model)
    benchmark.run_config("after", "text", prune)
    benchmark.compare()
    assert fingerprint(model) == trained


def test_restore_may_be_called_again_and_again() -> None:
    model = tiny_olmoe()
    before = fingerprint(model)
    state = ModelState(model)
    for change in (change_config, prune, change_config):
        change(model)
        state.restore()
        assert fingerprint(model) == before


def test_another_module_may_run_instead() -> None:
    model, other = tiny_olmoe(), tiny_olmoe(experts=4, layers=1)
    (measurement,) = bench(model).run_config("other", "text", lambda _: other)
    assert measurement.flops_per_token == 2 * (32 * 4 + 2 * 3 * 32 * 16)


# -- what is measured ------------------------------------------------------------------------------------


def test_figures_of_a_configuration() -> None:
    model = tiny_olmoe(top_k=3)
    benchmark = bench(model)
    texts = {"long": "abcdefghij" * 3, "short": "xyz"}
    benchmark.run_config("trained", texts)
    benchmark.run_config("one", texts, lambda m: replace_router(m, top_k(1)))
    benchmark.run_config("mass", texts, lambda m: replace_router(m, cumulative_mass(0.8)))
    table = benchmark.compare()
    expert, router = 2 * 3 * 32 * 16, 2 * 32 * 8
    assert table["config"] == ["trained", "one", "mass"]
    assert table["tokens"] == [33] * 3
    trained = 3 * (3 * expert + router)
    assert table["flops_per_token"] == [trained, 3 * (expert + router), trained]
    assert table["flops_per_token_ratio"][1] == pytest.approx((expert + router) / (3 * expert + router))
    assert table["k_mean"][:2] == [3, 1] and 1 < table["k_mean"][2] < 3
    assert table["skipped_share"][:2] == [0, 0]
    assert table["skipped_share"][2] == pytest.approx(1 - table["k_mean"][2] / 3)
    for row in table:
        assert min(row["tokens_per_s"], row["latency_ms"], row["router_ms"], row["experts_ms"]) > 0
        assert row["latency_ms_min"] <= row["latency_ms"] <= row["latency_ms_max"]
        assert 0 < row["router_confidence"] < 1 and row["load_max_over_mean"] >= 1
    assert table["tokens_per_s_ratio"][0] == 1
    assert str(benchmark.compare().rows) == str(table.rows), "measured again with nothing new"


def test_rounds_are_interleaved_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_olmoe(layers=1)
    order: list[str] = []
    benchmark = bench(model, repeats=2, warmup=2)
    for name in "abc":
        benchmark.run_config(name, "text", lambda m, name=name: order.append(name))
    order.clear()
    forwards = itertools.count()
    model.register_forward_pre_hook(lambda module, args: (next(forwards), None)[1])
    benchmark.compare()
    assert "".join(order) == "abccba"
    assert next(forwards) == 6 * (2 + 1 + 1), "two warm-up forwards, one bare, one profiled"


def test_the_timed_forward_carries_no_hook_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_olmoe(layers=1)
    seen: list[int] = []
    original = moe_trace.simple.benchmark._timed_forward_ms

    def look(model: Any, inputs: Any) -> float:
        seen.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
        return original(model, inputs)

    monkeypatch.setattr(moe_trace.simple.benchmark, "_timed_forward_ms", look)
    bench(model).run_config("a", "text")
    assert seen == [0]


def test_by_text_and_csv(tmp_path: Path) -> None:
    model = tiny_olmoe()
    benchmark = bench(model)
    texts = {"32": "a" * 32, "128": "a" * 128}
    benchmark.run_config("trained", texts)
    benchmark.run_config("one", texts, enter_a_rule)
    table = benchmark.compare(tmp_path / "t.csv", by_text=True)
    assert list(zip(table["config"], table["text"], table["tokens"], strict=True)) == [
        ("trained", "32", 32),
        ("trained", "128", 128),
        ("one", "32", 32),
        ("one", "128", 128),
    ]
    assert table["tokens_per_s_ratio"][:2] == [1, 1]
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == table.columns
    assert [float(r["latency_ms"]) for r in rows] == table["latency_ms"]
    assert [r["skipped_share_ratio"] for r in rows] == [""] * 4, "0 / 0 is not known"
    assert table.to_df()["tokens"].tolist() == table["tokens"]
    lines = str(table).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["trained", "32"],
        ["trained", "128"],
        ["one", "32"],
        ["one", "128"],
    ]
    assert "Medians of 3 interleaved rounds" in lines[-1]


def test_a_new_configuration_measures_all_again() -> None:
    benchmark = bench(tiny_olmoe(layers=1), repeats=1)
    benchmark.run_config("a", ["one", "two"])
    assert len(benchmark.compare()) == 1
    benchmark.run_config("b", "one")
    table = benchmark.compare()
    assert table["config"] == ["a", "b"] and table["rounds"] == [1, 1]
    assert all(math.isnan(low) for low in table["tokens_per_s_ratio_low"]), "one round has no interval"
    assert "(" not in str(table).splitlines()[2]


def test_a_bar_is_drawn_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, None, True):
        benchmark = bench(tiny_olmoe(layers=1), repeats=1, progress=progress)
        benchmark.run_config("a", "text")
        benchmark.compare()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("1/1" in captured.err) == (progress is True)
        assert "\x1b" not in captured.err


@pytest.mark.parametrize("texts", [[], {}, "", ["a", ""], {"a": 3}])
def test_texts_that_are_none(texts: Any) -> None:
    with pytest.raises(UsageError, match="none empty"):
        bench(tiny_olmoe(layers=1)).run_config("a", texts)


def test_models_without_routers_and_routers_without_calls() -> None:
    with pytest.raises(NoRoutersFound):
        bench(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="repeats"):
        bench(tiny_olmoe(layers=1), repeats=0)

    def go_past(model: Any) -> None:
        model.model.layers[0].mlp.forward = lambda hidden: hidden

    with (
        pytest.warns(RuntimeWarning, match="recorded no call"),
        pytest.raises(NothingRecorded, match=r"configuration 'past'.*no router module was called"),
    ):
        bench(tiny_olmoe(layers=1)).run_config("past", "text", go_past)


# -- the statistics ----------------------------------------------------------------------------------------


def measurement(config: str, milliseconds: float) -> Measurement:
    return Measurement(
        config=config,
        text="t",
        tokens=100,
        latency_ms=milliseconds,
        router_ms=1,
        experts_ms=2,
        flops_per_token=10,
        load_max_over_mean=1.5,
        router_confidence=0.5,
        k_mean=2,
        skipped_share=0,
    )


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that becomes ten times slower changes the spread, and no ratio."""
    slower = [1.0, 10.0, 3.0, 1.0, 7.0]
    rounds = [[measurement("a", 10 * s), measurement("b", 20 * s)] for s in slower]
    b = compare(rounds).rows[1]
    assert b["latency_ms"] == 60 and (b["latency_ms_min"], b["latency_ms_max"]) == (20, 200)
    assert (b["latency_ms_ratio"], b["latency_ms_ratio_low"], b["latency_ms_ratio_high"]) == (2, 2, 2)
    assert b["tokens_per_s_ratio"] == 0.5 and b["tokens_per_s"] == pytest.approx(100 / 0.06)


@pytest.mark.parametrize(("n", "rank", "coverage"), [(2, 1, 0.5), (5, 1, 0.9375), (9, 2, 0.9609375)])
def test_interval_of_the_median_by_hand(n: int, rank: int, coverage: float) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert interval(values) == (rank, n + 1 - rank, coverage)


def test_one_value_has_no_interval() -> None:
    low, high, coverage = interval([3.0])
    assert math.isnan(low) and math.isnan(high) and coverage == 0


@given(n=st.integers(6, 40))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_interval_is_the_narrowest_that_covers(n: int) -> None:
    low, high, coverage = interval(np.arange(1.0, n + 1))
    rank = int(low)
    assert high == n + 1 - rank

    def covers(r: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(r)) / 2**n

    assert coverage == pytest.approx(covers(rank)) and coverage >= 0.95
    assert covers(rank + 1) < 0.95 or rank + 1 > n // 2


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    yield
