"""Answer the questions in `QUESTIONS` about one summary or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_trace.data.errors import UsageError
from moe_trace.data.schema import Stage
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.ask.answer import QUESTIONS, Answer, each, multiplied
from moe_trace.read.ask.routing import imbalance, served, served_apart
from moe_trace.read.ask.time import balance, shares
from moe_trace.read.diff import compare
from moe_trace.read.findings.finding import Finding

TRIED_NEXT = 3
"""Number of findings that `next` names."""

_STAGE_QUESTIONS: dict[str, Callable[[TraceSummary], dict[str, Any]]] = {
    "imbalance": imbalance,
    "share": shares,
    "balance": balance,
    "experts": served,
}


def ask(
    summary: TraceSummary,
    other: TraceSummary | None = None,
    *,
    questions: Sequence[str] = tuple(QUESTIONS),
    labels: tuple[str, str] = ("A", "B"),
) -> tuple[Answer, ...]:
    """Answer questions about one trace, or about two, with a comparison of the experts that serve their
    texts.

    Args:
        other: A second run of the same model on another text.
        questions: Names in `QUESTIONS`; all of them by default.
        labels: Names for the two runs, for example after their texts.

    Raises:
        UsageError: There is no such question.
    """
    unknown = [name for name in questions if name not in QUESTIONS]
    if unknown:
        raise UsageError(f"no question {unknown[0]!r}; expected one of {', '.join(QUESTIONS)}")
    runs = [(labels[0] if other is not None else None, summary)]
    if other is not None:
        runs.append((labels[1], other))
    answers: list[Answer] = []
    for name in questions:
        if name == "experts" and other is not None:
            answers += _experts_of_both(summary, other, labels)
        elif name == "next":
            answers += [_answer_next(run, of) for run, of in runs]
        else:
            answers += [
                Answer(question=name, run=run, stage=stage, **_STAGE_QUESTIONS[name](part))
                for run, of in runs
                for stage, part in _stages(of)
            ]
    return tuple(answers)


def _stages(summary: TraceSummary) -> list[tuple[Stage | None, TraceSummary]]:
    return [*summary.by_stage().items()] or [(None, summary)]


def _experts_of_both(a: TraceSummary, b: TraceSummary, labels: tuple[str, str]) -> list[Answer]:
    routing = compare(a, b).routing
    stages = dict.fromkeys(change.stage for change in routing)
    if not stages:
        sentence = "Cannot tell: the two runs have no layer and stage in common."
        return [Answer(question="experts", run=None, stage=None, sentence=sentence)]
    return [
        Answer(
            question="experts",
            run=None,
            stage=stage,  # type: ignore[arg-type]
            **served_apart([r for r in routing if r.stage == stage], labels),
        )
        for stage in stages
    ]


def _answer_next(run: str | None, summary: TraceSummary) -> Answer:
    """Answer with the worst findings and an upper bound of the cost of each."""
    of_rule: dict[str, list[Finding]] = {}
    for finding in summary.findings:
        of_rule.setdefault(finding.rule, []).append(finding)
    rows = tuple(_describe_rule(found, summary) for found in list(of_rule.values())[:TRIED_NEXT])
    more = len(of_rule) - len(rows)
    if not rows:
        sentence = "Nothing stands out: no finding of the report's rules applies."
    else:
        sentence = "What is wrong comes first, then what takes most time"
        sentence += f"; the report names {more} more." if more else "."
    return Answer(question="next", run=run, stage=None, sentence=sentence, rows=rows)


def _describe_rule(found: Sequence[Finding], summary: TraceSummary) -> dict[str, Any]:
    """Describe one rule in the stages that it applies to, worst first."""
    worst, cost = found[0], found[0].cost_us
    part = summary.stages.get(worst.stage, summary) if worst.stage is not None else summary
    return {
        "rule": worst.rule,
        "stages": [finding.stage for finding in found if finding.stage is not None],
        "try": worst.advice,
        "why": " ".join(finding.sentence for finding in found),
        "at_most": each(cost, part) if cost is not None else None,
        **multiplied(cost, part),
    }
