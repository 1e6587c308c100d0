"""Answers, and helpers that express times per step and per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_trace.data.schema import Stage
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.findings.finding import duration

QUESTIONS: Mapping[str, str] = {
    "imbalance": "Which layer is most imbalanced, and is it real?",
    "share": "How much of the time is MoE, and how much the router?",
    "balance": "What would balance save?",
    "experts": "Which experts serve which text?",
    "next": "What to try next, and why?",
}
"""Question text by name, in the order in which the questions are answered."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """The answer to one question for one stage of one run."""

    question: str
    """A name in `QUESTIONS`."""
    run: str | None
    """Label of the run, or None for an answer about two runs together."""
    stage: Stage | None
    """Stage, or None for the run as a whole."""
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Figures that support the sentence: times in microseconds, shares from 0 to 1, None if unknown."""
    rows: tuple[Mapping[str, Any], ...] = ()
    """Figures for each pass, layer or finding."""

    def __repr__(self) -> str:
        return f"<Answer {self}>"

    def __str__(self) -> str:
        label = ", ".join(filter(None, (self.run, self.stage)))
        return f"{QUESTIONS[self.question]} {label}: {self.sentence}" if label else self.sentence


def steps_and_tokens(part: TraceSummary) -> tuple[int, int]:
    """Return the number of steps with calls, and of tokens in forward calls, counted once for all layers."""
    return max(1, part.totals.steps), max((router.tokens for router in part.routers), default=0)


def multiplied(us: float | None, part: TraceSummary) -> dict[str, float | None]:
    """Divide a time over the whole recording by its steps and by its tokens."""
    steps, tokens = steps_and_tokens(part)
    return {
        "us_per_step": us / steps if us is not None else None,
        "us_per_token": us / tokens if us is not None and tokens else None,
    }


def each(us: float, part: TraceSummary) -> str:
    """Format a time per step and token, such as `13.4 ms a step, 6.54 µs a token`."""
    times = multiplied(us, part)
    step, token = times["us_per_step"], times["us_per_token"]
    of_token = f", {duration(token)} a token" if token is not None else ""
    return f"{duration(step or 0.0)} a step{of_token}"
