"""Traces of vLLM's real engine (scripts/record_vllm_traces.py) in every command that reads traces.

The expected result follows from the requests: LENGTHS prompts, each answered with TOKENS tokens, of which the
first comes from the prompt's own step.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moe_trace
from moe_trace.cli import main
from moe_trace.read.findings.finding import Finding
from moe_trace.show.tensorboard.overview import overview
from moe_trace.show.text.report import render_text
from paths import DATA

TRACES = DATA / "vllm_traces"
ENGINES = ("eager", "compiled", "tp2")
LENGTHS, TOKENS = (9, 30, 17), 5
PREFILL, DECODE = sum(LENGTHS), len(LENGTHS) * (TOKENS - 1)
LAYERS, TOP_K = 4, 4


def json_of(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    assert main([*command, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_of_each_stage_are_those_of_the_requests(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json_of(capsys, "report", str(TRACES / engine))
    totals = {stage: part["totals"] for stage, part in report["stages"].items()}
    assert totals["prefill"]["tokens"] == PREFILL * LAYERS
    assert totals["decode"]["tokens"] == DECODE * LAYERS
    assert report["totals"]["tokens"] == (PREFILL + DECODE) * LAYERS
    assert report["totals"]["assignments"] == (PREFILL + DECODE) * LAYERS * TOP_K
    assert 1 < report["totals"]["requests_per_forward"] <= len(LENGTHS)


@pytest.mark.parametrize("engine", ENGINES)
def test_traces_pass_their_check(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(TRACES / engine)]) == 0
    assert "fail" not in capsys.readouterr().out.lower()


def test_tensor_parallel_ranks_are_one_decision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(TRACES / "tp2")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 ranks (tp 2): ranks (0, 1) route the same tokens, which count once." in said
    assert "the tokens of mixed calls count in prefill and decode, too" in said


def test_diff_says_what_two_engines_differ_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(TRACES / "eager"), str(TRACES / "compiled")]) == 0
    said = capsys.readouterr().out
    assert "graph or compiled  False" in said
    assert "changed" not in said  # the same prompts on the same weights, to within bfloat16


def test_placement_counts_each_token_once(capsys: pytest.CaptureFixture[str]) -> None:
    assignments = f"{(PREFILL + DECODE) * LAYERS * TOP_K:,} assignments"
    for engine in ("eager", "tp2"):
        assert main(["placement", str(TRACES / engine), "--ranks", "4"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert assignments in said
        assert ("1 rank routed the same tokens as another" in said) == (engine == "tp2")


def test_a_finding_of_several_stages_is_said_once() -> None:
    summary = moe_trace.read_summary(TRACES / "eager")
    dead = Finding(rule="dead_experts", value=1, threshold=0, sentence="Prefill: One.", advice="Two.")
    found = [
        replace(dead, stage="prefill"),
        replace(dead, stage="decode", sentence="Decode: Another."),
        replace(dead, stage="mixed", sentence="Mixed: One."),
        replace(dead, sentence="Of the run."),
    ]
    said = render_text(replace(summary, findings=tuple(found)))
    listed = said.partition("Findings, worst first\n")[2].partition("\n\n")[0]
    assert [line.strip() for line in listed.splitlines()] == [
        "- Prefill, mixed: One. Two.",
        "- Decode: Another. Two.",
        "- Of the run. Two.",
    ]


def cards(folder: Path) -> dict[str, Any]:
    trace = min(folder.iterdir())
    stages = overview(moe_trace.read_summary(trace))["stages"]
    return {card["label"]: card for card in stages[0]["cards"]}


def test_the_tab_says_why_split_experts_have_no_speed() -> None:
    assert cards(TRACES / "tp2")["expert FLOP/s"]["detail"] == "experts are split over ranks"
    assert cards(TRACES / "eager")["expert FLOP/s"]["detail"] == "the device's peak is not known"
