"""Tests of each number and sentence of the text report on a real H100 trace, by a brute-force reading.

The trace (OLMoE-1B-7B, 16 layers, one prefill of 2048 tokens and three decode steps) is read with plain
`json`, event by event; the text of the report is parsed table by table and sentence by sentence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest

from brute_force import PHASES, Brute, Slice, ns
from moe_trace.data.schema import RoutingSample
from moe_trace.read.findings.finding import Finding
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.text import render_text
from paths import DATA
from report_text import shown, table_in

PATH = DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz"
LAYERS, EXPERTS, TOP_K, WIDTH = 16, 64, 8, 2048
PEAK, BANDWIDTH = 989.4e12, 3.35e12
EXPERT_WEIGHTS = 3 * 2048 * 1024


@dataclass
class Call:
    sample: RoutingSample
    router: Slice
    block: Slice
    experts: Slice
    times: dict
    router_span: int
    router_busy: int


@dataclass
class Stage:
    """All that the report says of a stage, added up by hand."""

    calls: list[Call]
    model_ns: int
    text: str = field(repr=False)

    def of(self, layer: int) -> list[Call]:
        return [call for call in self.calls if call.sample.layer == layer]

    def counts(self, layer: int) -> list[int]:
        return [sum(int(c.sample.assignments[e]) for c in self.of(layer)) for e in range(EXPERTS)]

    def busy_us(self, phase: str, calls: list[Call] | None = None) -> float:
        return sum(c.times["busy"][phase] for c in (self.calls if calls is None else calls)) / 1000

    @property
    def tokens(self) -> int:
        return sum(c.sample.tokens for c in self.of(0))

    @cached_property
    def words(self) -> str:
        return " ".join(self.text.split())

    def table(self, title: str) -> dict[str, dict[str, str]]:
        return table_in(self.text, title)


@pytest.fixture(scope="module")
def summary() -> TraceSummary:
    return read_summary(PATH)


@pytest.fixture(scope="module")
def stages(summary: TraceSummary) -> dict[str, Stage]:
    brute, recording = Brute(PATH), read_recording(PATH)
    samples = {(s.name, s.call): s for s in recording.samples}
    calls = []
    for found in brute.calls():
        span = brute.device_span(found["router"])
        assert span is not None
        busy = sum(k.duration for k in brute.launched_in(found["router"]))
        places = (found["router"], found["block"], found["experts"])
        calls.append(Call(samples[found["name"], found["call"]], *places, brute.times(found), span, busy))
    begins = sorted(s.start for s in brute.slices if s.name == "aten::embedding")
    assert len(begins) == 4, "one forward of 2048 tokens, three of 1"
    work = {"prefill": 0, "decode": 0}
    for kernel, launch in brute.kernels_with_launch():
        work["prefill" if launch.start < begins[1] else "decode"] += kernel.duration
    text = render_text(summary)
    parts = re.split(r"^=== (\w+) =+$", text, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {
        name: Stage([c for c in calls if c.sample.stage == name], work[name], texts[name.capitalize()])
        for name in ("prefill", "decode")
    }


def both(stages: dict[str, Stage]) -> list[Stage]:
    return list(stages.values())


def test_headings(stages: dict[str, Stage], summary: TraceSummary) -> None:
    head = render_text(summary).split("Findings", 1)[0]
    calls = sum(len(s.calls) for s in stages.values())
    tokens = sum(c.sample.tokens for s in stages.values() for c in s.calls)
    slots = tokens * TOP_K
    steps = len({c.sample.step for s in stages.values() for c in s.calls})
    noun = "step" if steps == 1 else "steps"
    counted = f"{LAYERS} routers, {calls} calls, {steps} {noun}, {tokens:,} routed tokens"
    assert f"{counted}, {slots:,} assignments" in head
    assert "prefill (16 calls), decode (48 calls)" in head
    for name, stage in stages.items():
        steps = {c.sample.step for c in stage.calls}
        noun = "step" if len(steps) == 1 else "steps"
        tokens = sum(c.sample.tokens for c in stage.calls)
        per_step = tokens // LAYERS // len(steps)
        noun += f" of {per_step:,} {'token' if per_step == 1 else 'tokens'}"
        assert (
            f"{LAYERS} routers, {len(stage.calls)} calls, {len(steps)} {noun}, {tokens:,} routed tokens, "
            f"{tokens * TOP_K:,} assignments, stage {name}" in stage.words
        )


def test_loads(stages: dict[str, Stage]) -> None:
    for stage in both(stages):
        rows = stage.table("Load of the experts")
        for layer in range(LAYERS):
            row, counts = rows[f"L{layer:02d}"], stage.counts(layer)
            total, tokens = sum(counts), stage.tokens
            mean = total / EXPERTS
            assert total == tokens * TOP_K
            shown(row["calls"], len(stage.of(layer)))
            shown(row["tokens"], tokens)
            shown(row["max÷mean"], max(counts) / mean)
            shown(row["CV"], math.sqrt(sum((n - mean) ** 2 for n in counts) / EXPERTS) / mean)
            runs = tokens // 20  # of tokens that choose as one
            if runs < 2:
                assert row["chance"] == "-"
            else:
                shown(row["chance"], math.sqrt((1 - TOP_K / EXPERTS) / (runs * TOP_K / EXPERTS)))
            pairs = sum(abs(a - b) for a in counts for b in counts)
            shown(row["Gini"], pairs / (2 * EXPERTS**2 * mean))
            shares = [n / total for n in counts if n]
            shown(row["entropy"], -sum(p * math.log(p) for p in shares) / math.log(EXPERTS))
            shown(row["active"], len(shares))
            enough = total >= 20 * EXPERTS
            assert row["dead"] == (str(EXPERTS - len(shares)) if enough else "-")


def test_what_is_said_of_the_loads(stages: dict[str, Stage]) -> None:
    random = np.random.default_rng(11)
    for stage in both(stages):
        tokens = stage.tokens
        mean = tokens * TOP_K / EXPERTS
        assert f"Load max÷mean can be {math.ceil(mean) / mean:.3f} to {tokens / mean:.3f}" in stage.words
        spreads = [sum((n - mean) ** 2 for n in stage.counts(layer)) for layer in range(LAYERS)]
        chance = tokens * TOP_K * (1 - TOP_K / EXPERTS)
        drawn = []
        for _ in range(2000):  # uniform routing of as many tokens
            chosen = random.random((tokens, EXPERTS)).argsort(axis=1)[:, :TOP_K]
            loads = np.bincount(chosen.ravel(), minlength=EXPERTS)
            drawn.append(((loads - mean) ** 2).sum())
        assert np.mean(drawn) == pytest.approx(chance, rel=0.05)
        if tokens < 40:  # two runs of 20 that choose as one
            assert "So few tokens say nothing about balance" in stage.words
            continue
        runs = []
        for _ in range(2000):  # the same in runs of 20
            chosen = random.random((tokens // 20, EXPERTS)).argsort(axis=1)[:, :TOP_K]
            loads = np.bincount(chosen.ravel(), minlength=EXPERTS) * 20
            runs.append(((loads - loads.mean()) ** 2).sum())
        assert all(spread > max(*drawn, *runs) for spread in spreads)
        most = [i for i, spread in enumerate(spreads) if spread == max(spreads)]
        cv = math.sqrt(max(spreads) / EXPERTS) / mean
        by_chance = math.sqrt(np.mean(runs) / EXPERTS) / (tokens // 20 * 20 * TOP_K / EXPERTS)
        shown_chance = re.search(r"by chance ([\d.]+)\)", stage.words)
        assert shown_chance is not None and float(shown_chance[1]) == pytest.approx(by_chance, rel=0.05)
        named = ", ".join(f"L{i:02d}" for i in most[:4]) + (", …" if len(most) > 4 else "")
        tied = f"{len(most)} tied, " if len(most) > 1 else ""
        assert (
            f"16 of 16 layers are more uneven than uniform routing of {tokens:,} tokens (p < 0.001; 20 "
            f"tokens of a text count as one). "
            f"Most uneven: {named} ({tied}CV {cv:.3f}, by chance {shown_chance[1]})." in stage.words
        )


def test_routers(stages: dict[str, Stage]) -> None:
    for stage in both(stages):
        rows = stage.table("Routers")
        for layer in range(LAYERS):
            row, calls = rows[f"L{layer:02d}"], stage.of(layer)
            weights = [c.sample.tokens for c in calls]
            for name, figure in (("entropy", "router_entropy"), ("confidence", "confidence")):
                values = [getattr(c.sample, figure) for c in calls]
                shown(row[name], float(np.average(values, weights=weights)))
            host = [c.router.duration / 1000 for c in calls]
            shown(row["p50"], float(np.percentile(host, 50)))
            shown(row["p95"], float(np.percentile(host, 95)))
            shown(row["span"], float(np.median([c.router_span / 1000 for c in calls])))
            shown(row["busy"], float(np.median([c.router_busy / 1000 for c in calls])))
            shown(row["router"], 2 * EXPERTS * WIDTH * stage.tokens)
            shown(row["experts"], 2 * EXPERT_WEIGHTS * TOP_K * stage.tokens)


def test_phases(stages: dict[str, Stage]) -> None:
    for stage in both(stages):
        rows = stage.table("Breakdown forward, device µs, mean of")
        used = [p for p in PHASES if stage.busy_us(p)]
        for layer in (*range(LAYERS), None):
            calls = stage.calls if layer is None else stage.of(layer)
            row = rows["all" if layer is None else f"L{layer:02d}"]
            for phase in used:
                shown(row[phase], stage.busy_us(phase, calls) / len(calls))
            shown(row["gap"], sum(c.times["device_gap"] for c in calls) / 1000 / len(calls))
            shown(row["block"], sum(c.times["device_span"] for c in calls) / 1000 / len(calls))
        steps = len({c.sample.step for c in stage.calls})
        span = sum(c.times["device_span"] for c in stage.calls) / 1000
        for phase in used:
            shown(rows["a step"][phase], stage.busy_us(phase) / steps)
            shown(rows["total ms"][phase], stage.busy_us(phase) / 1000)
            shown(rows["share"][phase], stage.busy_us(phase) / span)
        assert f"mean of {len(stage.calls)} forward calls (gap: no kernel ran)" in stage.words


def test_shares(stages: dict[str, Stage]) -> None:
    for stage in both(stages):
        work = sum(stage.busy_us(phase) for phase in PHASES)
        steps = len({c.sample.step for c in stage.calls})
        found = re.search(
            r"MoE is ([\d.]+ %) of the model's busy device time\. Of MoE's busy device time: "
            r"router ([\d.]+ %), dispatch and combine ([\d.]+ %), experts ([\d.]+ %)\. "
            r"That is ([\d.,]+) ms a step, ([\d.,]+) µs a token\.",
            stage.words,
        )
        assert found is not None
        shown(found[1], work / (stage.model_ns / 1000))
        shown(found[2], stage.busy_us("router") / work)
        shown(found[3], (stage.busy_us("dispatch") + stage.busy_us("combine")) / work)
        shown(found[4], stage.busy_us("experts") / work)
        shown(found[5], work / steps / 1000)
        shown(found[6], work / stage.tokens)


def test_speed(stages: dict[str, Stage], summary: TraceSummary) -> None:
    brute = Brute(PATH)
    twins = {s.args["External id"]: s for s in brute.slices if s.cat == "gpu_user_annotation"}
    for stage in both(stages):
        rows = stage.table("Speed")
        assert "NVIDIA H100 80GB HBM3, bfloat16, peak 989 TFLOP/s, 3.35 TB/s" in stage.words
        for layer in range(LAYERS):
            row, calls = rows[f"L{layer:02d}"], stage.of(layer)
            flops = 2 * EXPERT_WEIGHTS * TOP_K * stage.tokens
            per_s = flops / (stage.busy_us("experts", calls) / 1e6)
            shown(row["experts"], per_s)
            shown(row["of peak"], per_s / PEAK)
            router = 2 * EXPERTS * WIDTH * stage.tokens
            shown(row["router"], router / (stage.busy_us("router", calls) / 1e6))
            ranges = [twins[c.experts.args["External id"]].duration for c in calls]
            shown(row["with gaps"], flops / (sum(ranges) / 1e9))
            hit = sum(int((c.sample.assignments > 0).sum()) for c in calls)
            least = 2 * (hit * EXPERT_WEIGHTS + 2 * stage.tokens * TOP_K * WIDTH)
            shown(row["FLOP/byte"], flops / least)
            assert row["bound by"] == ("memory" if flops / least < PEAK / BANDWIDTH else "arithmetic")


def test_cost_of_imbalance(stages: dict[str, Stage]) -> None:
    stage = stages["prefill"]
    time_us = np.array([stage.busy_us("experts", stage.of(layer)) for layer in range(LAYERS)])
    loads = np.array([stage.counts(layer) for layer in range(LAYERS)])
    x = np.column_stack([np.ones(LAYERS), (loads > 0).sum(axis=1), loads.max(axis=1)])
    solution, *_ = np.linalg.lstsq(x, time_us, rcond=None)
    residual = time_us - x @ solution
    covariance = np.linalg.inv(x.T @ x) * (residual @ residual) / (LAYERS - 3)
    even = x[np.argmin(loads.std(axis=1))]
    rows = stage.table("Experts' time of one forward call in µs, and at the most even load")
    t_13 = 2.179  # of 12 degrees of freedom, the next lower entry of the table: wider, never narrower
    for layer in range(LAYERS):
        row, difference = rows[f"L{layer:02d}"], x[layer] - even
        cost = float(difference @ solution)
        reach = t_13 * math.sqrt(difference @ covariance @ difference)
        shown(row["measured"], time_us[layer])
        shown(row["at most even"], time_us[layer] - cost)
        shown(row["cost"], cost)
        low, high = row["95 % interval"].split(" to ")
        shown(low, cost - reach)
        shown(high, cost + reach)
        sure = not cost - reach <= 0 <= cost + reach
        assert row["verdict"] == ("most even" if cost == 0 else "saves" if sure else "no effect seen")
    found = re.search(
        r"the experts take ([\d.]+) µs for each of the active experts and ([\d.]+) µs for each "
        r"of the assignments",
        stage.words,
    )
    assert found is not None
    shown(found[1], solution[1])
    shown(found[2], solution[2])
    assert "cannot tell (the loads vary by 0 % only" in stages["decode"].words
    assert all(
        (c.sample.assignments.max(), (c.sample.assignments > 0).sum()) == (1, 8)
        for c in stages["decode"].calls
    )


def test_findings(stages: dict[str, Stage], summary: TraceSummary) -> None:
    """Every sentence, and that no rule kept silent or spoke without reason."""
    found = {(f.stage, f.rule): f for f in summary.findings}
    assert len(found) == len(summary.findings) <= 8
    expected = {("prefill", rule) for rule in ("moving_tokens", "hot_expert", "dead_experts")}
    expected |= {("decode", rule) for rule in ("moving_tokens", "far_from_peak")}
    expected |= {(name, "launch_gaps") for name, stage in stages.items() if waits(stage)}
    assert set(found) == {*expected, (None, "uncounted_flops")}
    costs = [f.cost_us for f in summary.findings if f.cost_us is not None]
    assert costs == sorted(costs, reverse=True)
    for name, stage in stages.items():
        check_time(found, name, stage)
    check_load(found, stages["prefill"])
    flops = sum(2 * EXPERT_WEIGHTS * TOP_K * s.tokens * LAYERS for s in stages.values())
    sentence = found[None, "uncounted_flops"].sentence
    assert f"{flops / 1e12:.3g} TFLOP" in sentence
    text = " ".join(render_text(summary).split())
    for finding in summary.findings:
        assert f"{finding.sentence} {finding.advice}" in text


def gaps(stage: Stage) -> tuple[float, float]:
    """µs without a kernel within the blocks' time on the device, and that time."""
    gap, span = (sum(c.times[key] for c in stage.calls) / 1000 for key in ("device_gap", "device_span"))
    return gap, span


def waits(stage: Stage) -> bool:
    """Whether gaps are over half of the blocks' time."""
    gap, span = gaps(stage)
    return gap > 0.5 * span


def check_time(found: dict[tuple[str | None, str], Finding], name: str, stage: Stage) -> None:
    if waits(stage):
        gap, span = gaps(stage)
        finding = found[name, "launch_gaps"]
        assert finding.value == pytest.approx(gap / span) and finding.cost_us == pytest.approx(gap)
        assert (
            f"{100 * gap / span:.0f} % of the MoE blocks' time on the device, first kernel to last, is gaps"
            in finding.sentence
        )
        assert f"{gap / 1000:.3g} ms of {span / 1000:.3g} ms" in finding.sentence
    moved = stage.busy_us("dispatch") + stage.busy_us("combine")
    share = moved / sum(stage.busy_us(phase) for phase in PHASES)
    finding = found[name, "moving_tokens"]
    assert finding.value == pytest.approx(share) and finding.cost_us == pytest.approx(moved)
    assert f"take {100 * share:.0f} % of MoE's forward work" in finding.sentence
    if name == "decode":
        flops = 2 * EXPERT_WEIGHTS * TOP_K * stage.tokens * LAYERS
        hit = sum(int((c.sample.assignments > 0).sum()) for c in stage.calls)
        least = 2 * (hit * EXPERT_WEIGHTS + 2 * stage.tokens * LAYERS * TOP_K * WIDTH)
        above = stage.busy_us("experts") - 1e6 * max(flops / PEAK, least / BANDWIDTH)
        finding = found[name, "far_from_peak"]
        assert finding.value == pytest.approx(flops / stage.busy_us("experts") * 1e6 / PEAK)
        assert finding.cost_us == pytest.approx(above)
        assert f"take {above / 1000:.3g} ms more than the roofline" in finding.sentence
        assert "reading the weights from memory binds" in finding.advice


def check_load(found: dict[tuple[str | None, str], Finding], stage: Stage) -> None:
    loads = {f"L{layer:02d}": stage.counts(layer) for layer in range(LAYERS)}
    hot = {site: max(n) * EXPERTS / sum(n) for site, n in loads.items() if max(n) * EXPERTS / sum(n) >= 3}
    finding = found["prefill", "hot_expert"]
    assert set(finding.sites) == set(hot) and finding.value == max(hot.values())
    assert [hot[site] for site in finding.sites] == sorted(hot.values(), reverse=True)
    worst = finding.sites[0]
    expert = loads[worst].index(max(loads[worst]))
    assert f"{worst}: expert {expert} gets {hot[worst]:.1f}× its share" in finding.sentence
    assert "most possible 8.0×" in finding.sentence
    for site in finding.sites[1:4]:
        assert f"{site} expert {loads[site].index(max(loads[site]))} {hot[site]:.1f}×" in finding.sentence
    assert f"and {len(hot) - 4} more layers" in finding.sentence
    dead = {site: [e for e, n in enumerate(counts) if not n] for site, counts in loads.items()}
    dead = {site: ids for site, ids in dead.items() if ids}
    finding = found["prefill", "dead_experts"]
    assert set(finding.sites) == set(dead)
    total = sum(map(len, dead.values()))
    assert f"{total} experts in {len(dead)} layers got no token" in finding.sentence
    for site in finding.sites[:3]:
        ids = ", ".join(map(str, dead[site][:3]))
        assert f"{site} {len(dead[site])} of 64 ({ids}, …)" in finding.sentence


def test_distinct_experts_of_steps(stages: dict[str, Stage]) -> None:
    assert "Distinct experts" not in stages["prefill"].text
    table = stages["decode"].text.split("Distinct experts", 1)[1].split("\n\n", 1)[0]
    rows = {cells[0]: cells[1:] for cells in (re.split(r" {2,}", r.strip()) for r in table.splitlines())}
    for stage in both(stages):
        (tokens,) = {c.sample.tokens for c in stage.calls}
        calls, fewest, median, most, uniform, of, read, least, took = rows[f"{tokens:,}"]
        used = [int(np.count_nonzero(c.sample.assignments)) for c in stage.calls]
        forwards = len(used) // LAYERS
        weights = sum(used) / forwards * EXPERT_WEIGHTS * 2
        shown(calls, len(used))
        shown(fewest, min(used))
        shown(median, float(np.median(used)))
        shown(most, max(used))
        shown(uniform, EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens))
        assert of == str(EXPERTS)
        shown(read.removesuffix("B"), weights)
        shown(least, weights / BANDWIDTH * 1e6)
        shown(took, stage.busy_us("experts") / forwards)


def test_nothing_is_left_unread(stages: dict[str, Stage]) -> None:
    """Every block of a stage's text is one that a test above takes apart."""
    known = (
        "Load of",
        "Load max÷mean",
        "So few tokens",
        "Routers",
        "Breakdown forward",
        "MoE is",
        "Speed",
        "Distinct experts",
        "Least µs",
        "Cost of imbalance",
    )
    for stage in both(stages):
        blocks = [block for block in re.split(r"\n{2,}", stage.text.strip()) if block]
        for block in blocks[1:]:
            assert block.startswith((*known, "Notes")), block[:60]
    assert ns(1.5) == 1500
