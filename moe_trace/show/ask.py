"""Render answers as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.tables import number, paragraph, printable, share, wrapped
from moe_trace.read.ask import QUESTIONS, Answer

_LAYERS_SHOWN = 8


def render_answers(answers: Sequence[Answer]) -> str:
    """Render each question, followed by its answers for each run and stage."""
    parts = []
    for name in dict.fromkeys(answer.question for answer in answers):
        same_question = [answer for answer in answers if answer.question == name]
        parts.append(
            "\n\n".join([paragraph(f"{QUESTIONS[name]}  ({name})"), *map(_render_answer, same_question)])
        )
    return "\n\n\n".join(parts) + "\n"


def _render_answer(answer: Answer) -> str:
    label = ", ".join(filter(None, (printable(answer.run, 40) if answer.run else None, answer.stage)))
    parts = [
        paragraph(
            f"{label}: {printable(answer.sentence, 2000)}" if label else printable(answer.sentence, 2000)
        )
    ]
    if answer.rows:
        parts.append(_ROWS[answer.question](answer))
    return "\n".join(parts)


def _share_rows(answer: Answer) -> str:
    shares = (Column(part, terminal=share) for part in ("MoE", "router", "router/MoE"))
    rows = [
        (
            ", ".join(row["passes"]) if row["part"] == "backward" else row["part"],
            *(row["moe_of_model"], row["router_of_model"], row["router_of_moe"]),
            None if row["us_per_step"] is None else row["us_per_step"] / 1000,
            *(row["us_per_token"], row["us_per_call"]),
        )
        for row in answer.rows
    ]
    return text_table(("part", *shares, "ms a step", "µs a token", "µs a call"), rows)


def _balance_rows(answer: Answer) -> str:
    largest = sorted(answer.rows, key=lambda row: -abs(row["us_per_call"] or 0.0))[:_LAYERS_SHOWN]
    rows = [
        (row["layer"], row["us_per_call"], f"{number(row['low_us'])} to {number(row['high_us'])}")
        for row in largest
    ]
    headings = ("layer", "imbalance costs, µs a call", "95 % interval")
    return text_table(headings, rows) + _more_note(answer, len(largest))


def _expert_rows(answer: Answer) -> str:
    if "busiest" in answer.rows[0]:
        columns = max(len(row["busiest"]) for row in answer.rows)
        busiest = [
            (row["layer"], *(f"{e} ({share(part)})" for e, part in row["busiest"]), *[""] * columns)
            for row in answer.rows
        ]
        return text_table(
            ("layer", "busiest", *[""] * (columns - 1)), [row[: columns + 1] for row in busiest]
        )
    labels = [key for key in answer.rows[0] if key not in ("layer", "moved", "chance")]
    rows: list[tuple[Cell, ...]] = []
    for row in answer.rows[:_LAYERS_SHOWN]:
        first = (row["layer"], row["moved"], row["chance"])
        for label, begin in zip(labels, (first, ("", "", "")), strict=True):
            texts = (f"{e}: {share(here)} ({share(there)})" for e, here, there in row[label][:2])
            rows.append((*begin, label, ", ".join(texts)))
    headings = ("layer", "moved", "chance", "text", "experts that serve it more (other text)")
    return text_table(headings, rows, left=len(headings)) + _more_note(answer, len(rows) // 2)


def _more_note(answer: Answer, shown: int) -> str:
    remaining = len(answer.rows) - shown
    return f"\n… and {remaining} more; --format json has them all." if remaining > 0 else ""


def _next_rows(answer: Answer) -> str:
    lines = []
    for i, row in enumerate(answer.rows, 1):
        of = f" in {row['stages'][0]}" if len(row["stages"]) > 1 else ""
        cost = f" At most to save{of}: {row['at_most']}." if row["at_most"] else ""
        lines.append(
            wrapped(f"{printable(row['why'], 2000)} {printable(row['try'], 2000)}{cost}", f"  {i}. ")
        )
    return "\n".join(lines)


_ROWS = {
    "share": _share_rows,
    "balance": _balance_rows,
    "experts": _expert_rows,
    "next": _next_rows,
    "imbalance": lambda answer: "",
}


def plain_answers(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Convert answers to dicts for JSON."""
    return [{"asked": QUESTIONS[answer.question], **vars(answer)} for answer in answers]
