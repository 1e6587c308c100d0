"""Tests of each number and sentence of the report on training steps on a GPU, by a brute-force reading.

The traces have two steps of two layers of OLMoE's shape, without checkpointing and with both kinds of it.
Recomputation runs inside the backward, so forward, recomputed and backward work need separate call counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np
import pytest

from brute_force import PHASES, Brute, Slice
from moe_trace.data.schema import RoutingSample
from moe_trace.read.ask import ask
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.text import render_text
from paths import DATA
from report_text import shown, table_in

TRACES = ("h100/train_checkpointed", "h100/train_checkpointed_reentrant", "h200/train_grouped_mm")
LAYERS, EXPERTS, TOP_K, WIDTH, STEPS, TOKENS = 2, 64, 8, 2048, 2, 512
PEAK = {"h100": 989.4e12, "h200": 989.4e12}
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}
EXPERT_WEIGHTS = 3 * 2048 * 1024
ROUTER_FLOPS, EXPERT_FLOPS = 2 * EXPERTS * WIDTH * TOKENS, 2 * EXPERT_WEIGHTS * TOP_K * TOKENS
NODE = "autograd::engine::evaluate_function"


@dataclass
class Call:
    sample: RoutingSample
    router: Slice
    experts: Slice
    times: dict
    span: int | None
    busy: int


@dataclass
class Run:
    name: str
    calls: list[Call]
    model_ns: int
    backward_ns: int
    summary: TraceSummary
    experts_ranges_us: dict[int, float]
    text: str = field(repr=False)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def again(self) -> list[Call]:
        return [c for c in self.calls if c.sample.phase == "recompute"]

    def forward(self, layer: int | None = None) -> list[Call]:
        return [c for c in self.calls if c.sample.phase == "forward" and layer in (None, c.sample.layer)]

    def us(self, part: str, phase: str, layer: int | None = None) -> float:
        """Device time of a phase in one pass."""
        mine = [c for c in self.calls if layer in (None, c.sample.layer)]
        if part == "backward":
            return sum(c.times["backward"]["busy"][phase] for c in mine) / 1000
        return sum(c.times["busy"][phase] for c in mine if c.sample.phase == part) / 1000

    def work(self, *parts: str) -> float:
        return sum(self.us(part, phase) for part in parts for phase in PHASES)


@pytest.fixture(scope="module", params=TRACES)
def run(request: pytest.FixtureRequest) -> Run:
    path = DATA / f"{request.param}.pt.trace.json.gz"
    brute, summary = Brute(path), read_summary(path)
    samples = {(s.name, s.call): s for s in read_recording(path).samples}
    twins = {s.args["External id"]: s for s in brute.slices if s.cat == "gpu_user_annotation"}
    calls, ranges = [], dict.fromkeys(range(LAYERS), 0.0)
    for found in brute.calls():
        sample = samples[found["name"], found["call"]]
        busy = sum(k.duration for k in brute.launched_in(found["router"]))
        span = brute.device_span(found["router"])
        calls.append(Call(sample, found["router"], found["experts"], brute.times(found), span, busy))
        ranges[sample.layer] += twins[found["experts"].args["External id"]].duration / 1000
    nodes = [s for s in brute.slices if s.cat == "cpu_op" and s.name.startswith(NODE)]
    model = backward = 0
    for kernel, launch in brute.kernels_with_launch():
        model += kernel.duration
        backward += kernel.duration * any(
            n.thread == launch.thread and n.start <= launch.start < n.end for n in nodes
        )
    return Run(request.param, calls, model, backward, summary, ranges, render_text(summary))


def test_heading(run: Run) -> None:
    forward, again = len(run.forward()), len(run.again)
    assert forward == LAYERS * STEPS and again == (forward if "checkpointed" in run.name else 0)
    counted = (
        f"{forward} forward calls, {again} recomputed calls (gradient checkpointing)"
        if again
        else f"{forward} calls"
    )
    tokens = forward * TOKENS
    assert (
        f"{LAYERS} routers, {counted}, {STEPS} steps of {TOKENS} tokens, {tokens:,} routed tokens, "
        f"{tokens * TOP_K:,} "
        "assignments, stage train" in run.words
    )


def test_load_is_of_the_forward_calls(run: Run) -> None:
    rows = table_in(run.text, "Load of the experts, forward calls")
    for layer in range(LAYERS):
        row, calls = rows[f"L{layer:02d}"], run.forward(layer)
        counts = np.sum([c.sample.assignments for c in calls], axis=0)
        mean = counts.mean()
        assert counts.sum() == STEPS * TOKENS * TOP_K
        shown(row["calls"], len(calls))
        shown(row["tokens"], STEPS * TOKENS)
        shown(row["max÷mean"], counts.max() / mean)
        shown(row["CV"], counts.std() / mean)
        runs = STEPS * TOKENS // 20  # of tokens that choose as one
        shown(row["chance"], math.sqrt((1 - TOP_K / EXPERTS) / (runs * TOP_K / EXPERTS)))
        shown(row["Gini"], float(np.abs(counts[:, None] - counts[None]).sum() / (2 * EXPERTS**2 * mean)))
        share = counts[counts > 0] / counts.sum()
        shown(row["entropy"], float(-(share * np.log(share)).sum() / math.log(EXPERTS)))
        shown(row["active"], len(share))
        assert row["dead"] == str(EXPERTS - len(share))


def test_routers(run: Run) -> None:
    rows = table_in(run.text, "Routers")
    each = STEPS * (2 if run.again else 1)
    said = "FLOP of all forward and recomputed calls" if run.again else "FLOP of all calls"
    assert said in run.words
    for layer in range(LAYERS):
        row, calls = rows[f"L{layer:02d}"], run.forward(layer)
        shown(row["entropy"], float(np.mean([c.sample.router_entropy for c in calls])))
        shown(row["confidence"], float(np.mean([c.sample.confidence for c in calls])))
        host = [c.router.duration / 1000 for c in calls]
        shown(row["p50"], float(np.percentile(host, 50)))
        shown(row["p95"], float(np.percentile(host, 95)))
        shown(row["span"], float(np.median([(c.span or 0) / 1000 for c in calls])))
        shown(row["busy"], float(np.median([c.busy / 1000 for c in calls])))
        shown(row["router"], each * ROUTER_FLOPS)
        shown(row["experts"], each * EXPERT_FLOPS)


@pytest.mark.parametrize("part", ["forward", "recompute", "backward"])
def test_each_pass_by_its_own_number(run: Run, part: str) -> None:
    noun = {"forward": "forward calls", "recompute": "recomputed calls", "backward": "backwards"}[part]
    if part == "recompute" and not run.again:
        assert "recompute" not in run.text
        return
    calls = run.forward() if part != "recompute" else run.again
    assert f"Breakdown {part}, device µs, mean of {len(calls)} {noun}" in run.words
    rows = table_in(run.text, f"Breakdown {part}, device µs, mean of")
    per_layer = len(calls) // LAYERS
    used = [p for p in PHASES if run.us(part, p)]
    for layer in (*range(LAYERS), None):
        row = rows["all" if layer is None else f"L{layer:02d}"]
        for phase in used:
            shown(row[phase], run.us(part, phase, layer) / (per_layer if layer is not None else len(calls)))
        if part != "backward":
            mine = [c for c in calls if layer in (None, c.sample.layer)]
            shown(row["gap"], sum(c.times["device_gap"] for c in mine) / 1000 / len(mine))
            shown(row["block"], sum(c.times["device_span"] for c in mine) / 1000 / len(mine))
    whole = sum(c.times["device_span"] for c in calls) / 1000 if part != "backward" else run.work(part)
    for phase in used:
        shown(rows["a step"][phase], run.us(part, phase) / STEPS)
        shown(rows["total ms"][phase], run.us(part, phase) / 1000)
        shown(rows["share"][phase], run.us(part, phase) / whole)


def test_shares(run: Run) -> None:
    parts = ("forward", *(("recompute",) if run.again else ()), "backward")
    work, backward_us = run.work(*parts), run.backward_ns / 1000
    found = re.search(
        r"MoE is ([\d.]+ %) of the model's busy device time \(([\d.]+ %) of its forward, ([\d.]+ %) of its "
        r"backward(?: with recompute)?\)\. Of MoE's busy device time: "
        r"router ([\d.]+ %), dispatch and combine ([\d.]+ %), "
        r"experts ([\d.]+ %)\. By pass: (.*?)\. That is ([\d.,]+) ms a step, ([\d.,]+) µs a token\.",
        run.words,
    )
    assert found is not None and ("with recompute" in found[0]) == bool(run.again)
    shown(found[1], work / (run.model_ns / 1000))
    shown(found[2], run.work("forward") / (run.model_ns / 1000 - backward_us))
    shown(found[3], run.work(*parts[1:]) / backward_us)
    for i, phases in ((4, ("router",)), (5, ("dispatch", "combine")), (6, ("experts",))):
        shown(found[i], sum(run.us(part, phase) for part in parts for phase in phases) / work)
    assert [one.rsplit(" ", 2)[0] for one in found[7].split(", ")] == list(parts)
    for one, part in zip(found[7].split(", "), parts, strict=True):
        shown(one.split(" ", 1)[1], run.work(part) / work)
    shown(found[8], work / STEPS / 1000)
    shown(found[9], work / (STEPS * TOKENS))


def test_speed_is_of_forward_and_recomputed_calls(run: Run) -> None:
    rows = table_in(run.text, "Speed")
    card = run.name.partition("/")[0]
    each = STEPS * (2 if run.again else 1)
    for layer in range(LAYERS):
        row = rows[f"L{layer:02d}"]
        experts_us, router_us = (
            run.us("forward", phase, layer) + run.us("recompute", phase, layer)
            for phase in ("experts", "router")
        )
        flops = each * EXPERT_FLOPS
        shown(row["experts"], flops / experts_us * 1e6)
        shown(row["router"], each * ROUTER_FLOPS / router_us * 1e6)
        shown(row["with gaps"], flops / run.experts_ranges_us[layer] * 1e6)
        shown(row["of peak"], flops / experts_us * 1e6 / PEAK[card])
        hit = sum(int((c.sample.assignments > 0).sum()) for c in run.calls if c.sample.layer == layer)
        intensity = flops / (2 * (hit * EXPERT_WEIGHTS + 2 * each * TOKENS * TOP_K * WIDTH))
        shown(row["FLOP/byte"], intensity)
        assert row["bound by"] == ("memory" if intensity < PEAK[card] / BANDWIDTH[card] else "arithmetic")


def test_findings(run: Run) -> None:
    found = {f.rule: f for f in run.summary.findings}
    assert set(found) == {
        "launch_gaps",
        "far_from_peak",
        "moving_tokens",
        "hot_expert",
        "dead_experts",
        "uncounted_flops",
    }
    for finding in found.values():
        assert f"{finding.sentence} {finding.advice}" in run.words
    gap, span = (sum(c.times[name] for c in run.calls) / 1000 for name in ("device_gap", "device_span"))
    assert found["launch_gaps"].cost_us == pytest.approx(gap)
    assert f"{gap / 1000:.3g} ms of {span / 1000:.3g} ms" in found["launch_gaps"].sentence
    assert ("(forward and recomputed calls)" in found["launch_gaps"].sentence) == bool(run.again)
    moved = run.us("forward", "dispatch") + run.us("forward", "combine")
    assert found["moving_tokens"].value == pytest.approx(moved / run.work("forward"))
    assert (
        f"{100 * moved / run.work('forward'):.0f} % of MoE's forward work" in found["moving_tokens"].sentence
    )
    passes = ("forward", "recompute", "backward")
    assert found["moving_tokens"].cost_us == pytest.approx(
        sum(run.us(part, phase) for part in passes for phase in ("dispatch", "combine"))
    )
    card = run.name.partition("/")[0]
    experts_us = run.us("forward", "experts") + run.us("recompute", "experts")
    flops = len(run.calls) * EXPERT_FLOPS
    hit = sum(int((c.sample.assignments > 0).sum()) for c in run.calls)
    least = 2 * (hit * EXPERT_WEIGHTS + 2 * len(run.calls) * TOKENS * TOP_K * WIDTH)
    above = experts_us - 1e6 * max(flops / PEAK[card], least / BANDWIDTH[card])
    assert found["far_from_peak"].cost_us == pytest.approx(above)
    counts = np.sum([c.sample.assignments for c in run.forward(1)], axis=0)
    busiest = int(counts.argmax())
    assert (
        f"L01: expert {busiest} gets {counts.max() / counts.mean():.1f}× its share"
        in found["hot_expert"].sentence
    )
    dead = np.flatnonzero(counts == 0).tolist()
    ids = ", ".join(map(str, dead[:3]))
    assert f"{len(dead)} experts in 1 layer got no token" in found["dead_experts"].sentence
    assert f"L01 {len(dead)} of 64 ({ids}, …)" in found["dead_experts"].sentence
    assert f"{flops / 1e12:.3g} TFLOP" in found["uncounted_flops"].sentence


def test_answers_are_the_same_figures(run: Run) -> None:
    """`ask` multiplies the work of each pass by nothing but its own number."""
    parts = ("forward", *(("recompute",) if run.again else ()), "backward")
    answer = next(a for a in ask(run.summary) if a.question == "share")
    rows = {row["part"]: row for row in answer.rows}
    model_us, backward_us = run.model_ns / 1000, run.backward_ns / 1000
    wholes = {"forward": model_us - backward_us, "backward": backward_us, "all": model_us}
    sums = {"forward": ("forward",), "backward": parts[1:], "all": parts}
    if run.again:
        sums |= {"recompute": ("recompute",), "backward alone": ("backward",)}
    assert set(rows) == set(sums)
    for name, of in sums.items():
        work, router = run.work(*of), sum(run.us(part, "router") for part in of)
        known = name in wholes  # what is recomputed outside MoE is not told from the backward
        assert rows[name]["moe_of_model"] == (pytest.approx(work / wholes[name]) if known else None)
        assert rows[name]["router_of_model"] == (pytest.approx(router / wholes[name]) if known else None)
        assert rows[name]["router_us_per_step"] == pytest.approx(router / STEPS)
        assert rows[name]["router_us_per_token"] == pytest.approx(router / (STEPS * TOKENS))
        assert rows[name]["router_us_per_call"] == pytest.approx(router / (LAYERS * STEPS))
        assert rows[name]["router_of_moe"] == pytest.approx(router / work)
        assert rows[name]["us_per_step"] == pytest.approx(work / STEPS)
        assert rows[name]["us_per_token"] == pytest.approx(work / (STEPS * TOKENS))
        assert rows[name]["us_per_call"] == pytest.approx(work / (LAYERS * STEPS))


def test_nothing_is_left_unread(run: Run) -> None:
    """Every block of the text is one that a test above takes apart."""
    known = (
        "Findings",
        "Load of",
        "Load max÷mean",
        "Routers",
        "Breakdown",
        "MoE is",
        "Speed",
        "Cost of imbalance",
    )
    blocks = [block for block in re.split(r"\n{2,}", run.text.strip()) if block]
    for block in blocks[1:]:
        assert block.startswith((*known, "Notes")), block[:60]
    assert "Cost of imbalance: cannot tell (2 forward calls a layer; a fit needs 8" in run.words
    assert "Load max÷mean can be 1.000 to 8.000" in run.words
