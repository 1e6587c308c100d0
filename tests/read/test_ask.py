"""Tests of answers of `ask` and `moe-trace ask` against report, brute-force reading or planted effects."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_trace
from brute_force import PHASES, Brute
from moe_trace.cli import main
from moe_trace.data.errors import UsageError
from moe_trace.read.ask import QUESTIONS, Answer, ask
from moe_trace.read.reader import TraceSummary, read_summary
from moe_trace.show.ask import render_answers
from paths import DATA
from tiny_trace import write_tiny

H100 = DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz"


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def h100() -> TraceSummary:
    return read_summary(H100)


def tiny(path: Path, **arguments: Any) -> Path:
    """Calls of one stage."""
    return write_tiny(path, change=lambda sample: replace(sample, stage="prefill"), **arguments)


def answer(summary: TraceSummary, question: str, stage: str | None = None) -> Answer:
    [found] = [a for a in ask(summary, questions=[question]) if stage in (None, a.stage)]
    return found


def test_every_question_is_answered_for_every_stage(h100: TraceSummary) -> None:
    answers = moe_trace.ask(h100)
    assert [(a.question, a.stage) for a in answers] == [
        *((name, stage) for name in list(QUESTIONS)[:4] for stage in ("prefill", "decode")),
        ("next", None),
    ]
    worst = h100.by_stage()["prefill"].most_imbalanced_layer()
    assert worst is not None
    words = (
        f"Which layer is most imbalanced, and is it real? prefill: {worst.info.site}: CV {worst.load.cv:.3f}"
    )
    assert str(answers[0]).startswith(words)


def test_the_most_imbalanced_layer_is_the_report_s(h100: TraceSummary) -> None:
    found, prefill = answer(h100, "imbalance", "prefill"), h100.by_stage()["prefill"]
    worst = prefill.most_imbalanced_layer()
    assert worst is not None and found.figures["layers"] == [worst.info.site]
    assert found.figures["cv"] == worst.load.cv and found.figures["real_layers"] == 16
    assert (
        f"Expert {int(np.argmax(worst.assignments))} gets 8.00× its share (most possible 8.00×)"
        in found.sentence
    )
    assert f"{worst.load.active_experts} of 64 experts got tokens" in found.sentence


def test_too_few_tokens_say_nothing(h100: TraceSummary) -> None:
    found = answer(h100, "imbalance", "decode")
    assert found.sentence.startswith("Cannot tell: 3 tokens a layer") and found.figures["layers"] == []


def test_an_even_load_is_no_layer(tmp_path: Path) -> None:
    summary = read_summary(tiny(tmp_path / "a.json", calls=60, counts=lambda layer, call: (2, 2, 2, 2)))
    assert answer(summary, "imbalance").sentence.startswith(
        "None beyond chance: uniform routing of 240 tokens"
    )


def test_layers_that_tie_are_all_named(tmp_path: Path) -> None:
    summary = read_summary(tiny(tmp_path / "a.json", calls=90, counts=lambda layer, call: (4, 4, 0, 0)))
    found = answer(summary, "imbalance")
    assert found.figures["layers"] == ["L00", "L01"] and "L00, L01 (2 layers tie)" in found.sentence


def test_shares_are_those_of_the_trace(h100: TraceSummary) -> None:
    """Per stage, step, token and call, from a reading event by event."""
    brute = Brute(H100)
    begins = sorted(s.start for s in brute.slices if s.name == "aten::embedding")
    samples = {(s.name, s.call): s for s in h100.samples}
    model = {"prefill": 0, "decode": 0}
    for kernel, launch in brute.kernels_with_launch():
        model["prefill" if launch.start < begins[1] else "decode"] += kernel.duration
    moe, router = dict.fromkeys(model, 0), dict.fromkeys(model, 0)
    for call in brute.calls():
        stage, times = samples[call["name"], call["call"]].stage, brute.times(call)["busy"]
        moe[stage] += sum(times[phase] for phase in PHASES)
        router[stage] += times["router"]
    for stage, tokens, calls in (("prefill", 2048, 16), ("decode", 3, 48)):
        steps = len({sample.step for sample in samples.values() if sample.stage == stage})
        [row] = answer(h100, "share", stage).rows
        assert row["part"] == "all"
        assert row["moe_of_model"] == pytest.approx(moe[stage] / model[stage])
        assert row["router_of_model"] == pytest.approx(router[stage] / model[stage])
        assert row["router_of_moe"] == pytest.approx(router[stage] / moe[stage])
        assert row["us_per_step"] == pytest.approx(moe[stage] / 1000 / steps)
        assert row["us_per_token"] == pytest.approx(moe[stage] / 1000 / tokens)
        assert row["us_per_call"] == pytest.approx(moe[stage] / 1000 / calls)
        assert row["router_us_per_token"] == pytest.approx(router[stage] / 1000 / tokens)
        assert row["router_us_per_call"] == pytest.approx(router[stage] / 1000 / calls)


def test_an_unknown_model_s_share_is_not_0(h100: TraceSummary) -> None:
    part = h100.by_stage()["prefill"]
    assert part.phases is not None
    unknown = replace(part.phases.whole, model_work_us=None, moe_share_of_model=None)
    found = answer(replace(part, phases=replace(part.phases, whole=unknown)), "share")
    assert found.rows[-1]["moe_of_model"] is None
    assert (
        "cannot be separated here: record with prof.step()" in found.sentence
        and "MoE is" not in found.sentence
    )
    assert answer(replace(part, phases=None), "share").sentence.startswith("Cannot tell")


def test_what_balance_would_save_is_the_sum_of_the_layers(h100: TraceSummary) -> None:
    prefill = h100.by_stage()["prefill"]
    found = answer(h100, "balance", "prefill")
    total = sum(cost.cost_us * cost.calls for cost in prefill.imbalance if cost.cost_us is not None)
    assert total < 0 and found.figures["cost_us"] == pytest.approx(total)
    assert found.figures["us_per_token"] == pytest.approx(total / 2048)
    assert found.figures["low_us"] <= total <= found.figures["high_us"]
    assert f"it would cost {-total / 1000:.3g} ms a step" in found.sentence
    assert answer(h100, "balance", "decode").sentence.startswith("Cannot tell: the loads vary by 0 %")


def test_a_planted_cost_is_what_balance_saves(tmp_path: Path) -> None:
    """Each slot of the busiest expert takes 4 µs more; the evenest load has 5 of them."""
    most = np.random.default_rng(0).integers(5, 9, (2, 24))

    def counts(layer: int, call: int) -> tuple[int, ...]:
        busiest = int(most[layer, call])
        left = 16 - busiest
        return (busiest, left // 3 + left % 3, left // 3, left // 3)

    def stretch(layer: int, call: int, op: str) -> float:
        return (10 + 2.0 * max(counts(layer, call))) / 10 if op == "aten::mm" else 1e-3

    summary = read_summary(tiny(tmp_path / "a.json", calls=24, counts=counts, stretch=stretch))
    found = answer(summary, "balance")
    least = min(max(counts(layer, call)) for layer in range(2) for call in range(24))
    planted = sum(4.0 * (max(counts(layer, call)) - least) for layer in range(2) for call in range(24))
    assert found.figures["cost_us"] == pytest.approx(planted, rel=1e-3)
    assert found.figures["us_per_step"] == pytest.approx(planted / 24, rel=1e-3)
    assert (
        found.sentence.startswith(f"At most {planted / 24:.3g} µs a step") and "Most in L0" in found.sentence
    )


def test_which_experts_serve_which_text(tmp_path: Path) -> None:
    """Expert 3 has the one text, expert 0 the other; the labels are the user's."""
    paths = [
        tiny(tmp_path / f"{name}.json", calls=12, counts=lambda layer, call, to=to: to[layer])
        for name, to in (("code", ((1, 2, 1, 4), (2, 2, 2, 2))), ("prose", ((4, 2, 1, 1), (2, 2, 2, 2))))
    ]
    code, out, err = run("ask", *paths, "--labels", "code,prose", "-q", "experts")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert "1 of 2 layers send code and prose to different experts beyond chance, L00 most: 38 %" in words
    lines = [line.split() for line in out.splitlines()]
    assert "code 3: 50.0 % (12.5 %)" in " ".join(
        next(line for line in lines if "code" in line and "L00" in line)
    )
    assert next(line for line in lines if line[:1] == ["prose"])[1] == "0:"
    [same] = [a for a in ask(*(read_summary(paths[0]) for _ in range(2)), questions=["experts"])]
    assert same.sentence.startswith("The same")


def test_what_to_try_next_is_the_worst_findings_each_rule_once(h100: TraceSummary) -> None:
    found = answer(h100, "next")
    assert [row["rule"] for row in found.rows] == list(dict.fromkeys(f.rule for f in h100.findings))[:3]
    first, worst = found.rows[0], h100.findings[0]
    assert worst.cost_us is not None and worst.stage == "decode" == first["stages"][0]
    assert first["us_per_step"] == pytest.approx(worst.cost_us / h100.by_stage()["decode"].totals.steps)
    assert all(f.sentence in first["why"] for f in h100.findings if f.rule == worst.rule)
    nothing = answer(replace(h100, findings=()), "next")
    assert nothing.rows == () and nothing.sentence.startswith("Nothing stands out")


def test_json_has_the_figures_and_text_fits_a_terminal(h100: TraceSummary) -> None:
    code, out, _ = run("ask", H100, "--format", "json", "-q", "balance", "-q", "share")
    answers = json.loads(out)
    assert code == 0 and {a["question"] for a in answers} == {"balance", "share"}
    assert answers[0]["asked"] == QUESTIONS["balance"] and answers[0]["rows"][0]["layer"] == "L00"
    text = render_answers(ask(h100))
    assert max(map(len, text.splitlines())) <= 80
    assert all(question in text for question in QUESTIONS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H100, "--labels", "a,b"), "one path was given"),
        ((H100, H100, "--labels", "a"), "expected two different names"),
        ((H100, H100, "--labels", "a,a"), "expected two different names"),
    ],
)
def test_labels_that_cannot_be_are_refused(arguments: tuple[object, ...], message: str) -> None:
    code, out, err = run("ask", *arguments)
    assert code and not out and message in err


def test_runs_are_called_by_what_their_names_do_not_share(tmp_path: Path) -> None:
    paths = [tiny(tmp_path / f"h100_run_{name}.pt.trace.json", calls=2) for name in ("code", "prose")]
    _, out, _ = run("ask", *paths, "-q", "imbalance")
    assert "\ncode, prefill: " in out and "\nprose, prefill: " in out


def test_an_unknown_question_is_an_error(h100: TraceSummary) -> None:
    with pytest.raises(UsageError, match="expected one of imbalance, share"):
        ask(h100, questions=["colour"])
