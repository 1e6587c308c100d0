"""Tests of the cost of imbalance: finds planted costs, ignores planted trends, does not extrapolate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_trace.read.reader import TraceSummary, read_summary
from moe_trace.show.text import render_text
from paths import DATA
from tiny_ranks import Run, sent, write_ranks
from tiny_trace import EXPERTS, write_tiny

H100 = DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz"
Counts = Callable[[int, int], tuple[int, ...]]
CALLS = 24


def loads(seed: int, *, drift: bool = False) -> Counts:
    """16 slots of 4 experts, other ones in each layer and call; with `drift` more uneven by the call."""
    random = np.random.default_rng(seed)
    uneven = random.random((2, CALLS))
    if drift:
        uneven = np.repeat(np.linspace(0, 1, CALLS)[None], 2, axis=0)
    table = {}
    for layer in range(2):
        for call in range(CALLS):
            first = 4 + round(4 * uneven[layer, call])
            rest = 16 - first
            table[layer, call] = (first, rest // 3 + rest % 3, rest // 3, rest // 3)
    return lambda layer, call: table[layer, call]


def report(path: Path, counts: Counts, us: Callable[[int, int, np.ndarray], float]) -> TraceSummary:
    """Each of the two products of a call takes as long as `us` says, in units of 10 µs."""

    def stretch(layer: int, call: int, op: str) -> float:
        return us(layer, call, np.array(counts(layer, call))) / 10 if op == "aten::mm" else 1e-3

    return read_summary(write_tiny(path, calls=CALLS, counts=counts, stretch=stretch))


def test_a_cost_of_the_busiest_expert_is_found(tmp_path: Path) -> None:
    counts = loads(1)
    summary = report(tmp_path / "a.json", counts, lambda layer, call, load: 10 + 2.0 * load.max())
    (model,) = summary.load_models
    assert model.verdict == "costs" and model.held_out_r2 == pytest.approx(1, abs=1e-6)
    assert model.us_per_unit == {"slots of the busiest expert": pytest.approx(4.0, rel=1e-6)}
    even = min(max(counts(layer, call)) for layer in range(2) for call in range(CALLS))
    for layer, cost in enumerate(summary.imbalance):
        excess = np.mean([max(counts(layer, call)) - even for call in range(CALLS)])
        assert cost.cost_us == pytest.approx(4.0 * excess, rel=1e-6)
    decode = summary.stages["decode"]
    assert "costly_imbalance" in {finding.rule for finding in decode.findings}


def test_active_experts_make_even_loads_slower(tmp_path: Path) -> None:
    """Weights are read for each active expert: the uneven load is the faster one, and that is said."""
    random = np.random.default_rng(2)
    active = random.integers(1, EXPERTS + 1, (2, CALLS))

    def counts(layer: int, call: int) -> tuple[int, ...]:
        n = int(active[layer, call])
        # The busiest expert is no function of the number of active ones.
        first = 6 + (call * 7 + layer) % 5 if n > 1 else 16
        rest = [0] * EXPERTS
        rest[0] = first
        for i in range(16 - first):
            rest[1 + i % max(1, n - 1)] += 1
        return tuple(rest)

    summary = report(tmp_path / "a.json", counts, lambda layer, call, load: 5.0 * np.count_nonzero(load))
    (model,) = summary.load_models
    assert model.verdict == "saves" and model.us_per_unit["active experts"] == pytest.approx(10.0, rel=1e-3)
    assert "Uneven load saves time here" in " ".join(render_text(summary.stages["decode"]).split())
    assert "costly_imbalance" not in {finding.rule for finding in summary.findings}


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_trend_is_not_taken_for_a_cost(tmp_path: Path, noise: float) -> None:
    """Load and time both drift with the step, as a CPU that heats up: no cost is claimed."""
    random = np.random.default_rng(4)
    summary = report(
        tmp_path / "a.json",
        loads(5, drift=True),
        lambda layer, call, load: (20 + call) * (1 + noise * random.normal()),
    )
    assert summary.load_models[0].verdict in ("cannot tell", "no effect seen")
    assert "costly_imbalance" not in {finding.rule for finding in summary.findings}


def test_a_cost_is_found_under_a_trend(tmp_path: Path) -> None:
    counts = loads(6)
    summary = report(tmp_path / "a.json", counts, lambda layer, call, load: 10 + 2 * load.max() + 3 * call)
    (model,) = summary.load_models
    assert model.verdict == "costs" and model.comparison == "forwards and layers"
    assert model.us_per_unit["slots of the busiest expert"] == pytest.approx(4.0, rel=1e-6)


def test_noise_that_hides_the_answer_is_said(tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    summary = report(tmp_path / "a.json", loads(9), lambda layer, call, load: 20 + 15 * random.random())
    model = summary.load_models[0]
    assert model.verdict in ("cannot tell", "no effect seen")


def test_on_an_h100_the_most_uneven_layer_is_the_fastest() -> None:
    """Against a fit written out with dummies for every forward, and folds of layers by hand."""
    prefill = read_summary(H100).by_stage()["prefill"]
    (model,) = prefill.load_models
    times = prefill.times
    assert times is not None and model.verdict == "saves" and model.comparison == "forwards"
    time_us = times.forward.busy_ns[:, 2] / 1000
    rows = [sample.assignments for sample in times.samples]
    x = np.array([[np.count_nonzero(row), row.max()] for row in rows], float)
    design = np.column_stack([np.ones(len(x)), x])
    solution, *_ = np.linalg.lstsq(design, time_us, rcond=None)
    assert list(model.us_per_unit.values()) == pytest.approx(solution[1:])
    layer = np.array([sample.layer for sample in times.samples])
    centred_x, centred_y = x - x.mean(axis=0), time_us - time_us.mean()
    error = 0.0
    for fold in range(5):
        unseen = layer % 5 == fold
        slopes, *_ = np.linalg.lstsq(centred_x[~unseen], centred_y[~unseen], rcond=None)
        error += ((centred_y[unseen] - centred_x[unseen] @ slopes) ** 2).sum()
    assert model.held_out_r2 == pytest.approx(1 - error / (centred_y**2).sum())
    even = x[np.argmin([row.std() for row in rows])]
    for i, cost in enumerate(prefill.imbalance):
        row = int(np.flatnonzero(layer == i)[0])
        assert cost.cost_us == pytest.approx(float((x[row] - even) @ solution[1:]))
        assert cost.measured_us == pytest.approx(time_us[row])
    decode = read_summary(H100).by_stage()["decode"].load_models[0]
    assert decode.verdict == "cannot tell" and "record more tokens a step" in decode.reason


def test_advice_is_for_the_set_up_of_the_trace() -> None:
    """One GPU: no word of ranks, replicas or expert parallelism."""
    for path in (H100, DATA / "h200" / "train_grouped_mm.pt.trace.json.gz"):
        for finding in read_summary(path).findings:
            text = f"{finding.sentence} {finding.advice}".lower()
            assert not any(word in text for word in ("parallel", "rank", "replicate")), text


@pytest.mark.parametrize(("us_a_slot", "verdict"), [(1.0, "costs"), (0.0, "no effect seen")])
def test_many_gpus_wait_for_the_busiest_rank(tmp_path: Path, us_a_slot: float, verdict: str) -> None:
    """Experts on two ranks: a rank takes as long as the slots that reach it, whoever routed them."""
    random = np.random.default_rng(3)
    table = random.integers(1, 9, (2, 2, CALLS, EXPERTS))
    table[..., 0] += table[..., :].sum(-1) % 2  # an even number of slots: two for each token
    noise = random.normal(size=(2, 2, CALLS))

    def counts(rank: int, layer: int, call: int) -> tuple[int, ...]:
        return tuple(table[rank, layer, call].tolist())

    def slots(rank: int, layer: int, call: int) -> int:
        return sum(sent(run, other, rank, layer, call) for other in range(2))

    def stretch(rank: int, layer: int, call: int, name: str) -> float:
        us = 10 + us_a_slot / 2 * slots(rank, layer, call) + 0.01 * noise[rank, layer, call]
        return us / 10 if name == "aten::mm" else 0.01

    run = Run(calls=CALLS, counts=counts, stretch=stretch)
    write_ranks(tmp_path, run)
    summary = read_summary(tmp_path)
    (model,) = summary.load_models
    assert model.verdict == verdict and model.comparison == "ranks"
    assert model.us_per_unit["slots of the rank"] == pytest.approx(us_a_slot, abs=0.01)
    for layer, cost in enumerate(summary.imbalance):
        loads = np.array([[slots(rank, layer, call) for rank in range(2)] for call in range(CALLS)])
        excess = (loads.max(axis=1) - loads.mean(axis=1)).mean()
        assert cost.cost_us == pytest.approx(us_a_slot * excess, abs=0.1)
    if us_a_slot:
        assert model.held_out_r2 == pytest.approx(1, abs=1e-3)
        text = " ".join(render_text(summary.stages["decode"]).split())
        assert "The busiest rank takes longer than the mean one" in text
