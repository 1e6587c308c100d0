"""What an answer is, and how its figures are multiplied for the reader."""

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
"""Name -> the question that it stands for, in the order in which they are answered."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """One question, answered for one stage of one run."""

    question: str
    """A name in `QUESTIONS`."""
    run: str | None
    """Label of the run; None for an answer about both of two runs."""
    stage: Stage | None
    """None for the run as a whole."""
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What the sentence rests on; times in microseconds, shares from 0 to 1, None where it is not known."""
    rows: tuple[Mapping[str, Any], ...] = ()
    """The same for each pass, layer or finding."""

    def __repr__(self) -> str:
        return f"<Answer {self}>"

    def __str__(self) -> str:
        of = ", ".join(filter(None, (self.run, self.stage)))
        return f"{QUESTIONS[self.question]} {of}: {self.sentence}" if of else self.sentence


def steps_and_tokens(part: TraceSummary) -> tuple[int, int]:
    """Steps that the calls are of, and tokens of the forward calls, once for all layers."""
    return max(1, part.totals.steps), max((router.tokens for router in part.routers), default=0)


def multiplied(us: float | None, part: TraceSummary) -> dict[str, float | None]:
    """A time over the whole recording, for each step and each token."""
    steps, tokens = steps_and_tokens(part)
    return {
        "us_per_step": us / steps if us is not None else None,
        "us_per_token": us / tokens if us is not None and tokens else None,
    }


def each(us: float, part: TraceSummary) -> str:
    """`13.4 ms a step, 6.54 µs a token`."""
    times = multiplied(us, part)
    step, token = times["us_per_step"], times["us_per_token"]
    of_token = f", {duration(token)} a token" if token is not None else ""
    return f"{duration(step or 0.0)} a step{of_token}"
