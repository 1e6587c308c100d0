"""Answers as text and JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_trace.data.display.tables import fixed, number, paragraph, printable, screen_width, share, table
from moe_trace.read.ask import QUESTIONS, Answer

_LAYERS_SHOWN = 8


def render_answers(answers: Sequence[Answer]) -> str:
    """Each question with the answer for each run and stage below it."""
    parts = []
    for name in dict.fromkeys(answer.question for answer in answers):
        mine = [answer for answer in answers if answer.question == name]
        parts.append("\n\n".join([paragraph(f"{QUESTIONS[name]}  ({name})"), *map(_one, mine)]))
    return "\n\n\n".join(parts) + "\n"


def _one(answer: Answer) -> str:
    of = ", ".join(filter(None, (printable(answer.run, 40) if answer.run else None, answer.stage)))
    parts = [
        paragraph(f"{of}: {printable(answer.sentence, 2000)}" if of else printable(answer.sentence, 2000))
    ]
    if answer.rows:
        parts.append(_ROWS[answer.question](answer))
    return "\n".join(parts)


def _share_rows(answer: Answer) -> str:
    headings = ("part", "MoE", "router", "router/MoE", "ms a step", "µs a token", "µs a call")
    rows = [
        [
            ", ".join(row["passes"]) if row["part"] == "backward" else row["part"],
            share(row["moe_of_model"]),
            share(row["router_of_model"]),
            share(row["router_of_moe"]),
            number(row["us_per_step"] / 1000 if row["us_per_step"] is not None else None),
            number(row["us_per_token"]),
            number(row["us_per_call"]),
        ]
        for row in answer.rows
    ]
    return table(headings, rows)


def _balance_rows(answer: Answer) -> str:
    shown = sorted(answer.rows, key=lambda row: -abs(row["us_per_call"] or 0.0))[:_LAYERS_SHOWN]
    rows = [
        [
            printable(row["layer"], 20),
            number(row["us_per_call"]),
            f"{number(row['low_us'])} to {number(row['high_us'])}",
        ]
        for row in shown
    ]
    return table(("layer", "imbalance costs, µs a call", "95 % interval"), rows) + _more(answer, len(shown))


def _expert_rows(answer: Answer) -> str:
    if "busiest" in answer.rows[0]:
        rows = [
            [printable(row["layer"], 20), *(f"{e} ({share(part)})" for e, part in row["busiest"])]
            for row in answer.rows
        ]
        width = max(map(len, rows))
        rows = [row + [""] * (width - len(row)) for row in rows]
        return table(("layer", "busiest", *[""] * (width - 2)), rows)
    labels = [key for key in answer.rows[0] if key not in ("layer", "moved", "chance")]
    rows = []
    for row in answer.rows[:_LAYERS_SHOWN]:
        first = [printable(row["layer"], 20), fixed(row["moved"], 3), fixed(row["chance"], 3)]
        for label, begin in zip(labels, (first, ["", "", ""]), strict=True):
            served = (f"{e}: {share(here)} ({share(there)})" for e, here, there in row[label][:2])
            rows.append([*begin, printable(label, 20), ", ".join(served)])
    headings = ("layer", "moved", "chance", "text", "experts that serve it more (other text)")
    return table(headings, rows, left=len(headings)) + _more(answer, len(rows) // 2)


def _more(answer: Answer, shown: int) -> str:
    left = len(answer.rows) - shown
    return f"\n… and {left} more; --format json has them all." if left > 0 else ""


def _next_rows(answer: Answer) -> str:
    lines = []
    for i, row in enumerate(answer.rows, 1):
        of = f" in {row['stages'][0]}" if len(row["stages"]) > 1 else ""
        cost = f" At most to save{of}: {row['at_most']}." if row["at_most"] else ""
        text = f"{printable(row['why'], 2000)} {printable(row['try'], 2000)}{cost}"
        lines.append(
            textwrap.fill(
                text,
                screen_width(),
                initial_indent=f"  {i}. ",
                subsequent_indent="     ",
                break_on_hyphens=False,
            )
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
    """As JSON holds them."""
    return [{"asked": QUESTIONS[answer.question], **asdict(answer)} for answer in answers]
