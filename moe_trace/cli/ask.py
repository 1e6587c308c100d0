"""Answer common questions about a trace, for each stage (prefill, decode, train) separately.

The questions are: which layer is most imbalanced, and whether the imbalance is real; how much time is spent
in MoE layers and in the router, per step, token and call; what a balanced load would save; what to try next,
and why. For two runs on different text, also which experts serve which text. `report` prints the tables that
the answers are based on.

Example: moe-trace ask runs/code runs/prose --labels code,prose --question experts
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from moe_trace.cli.arguments import add_filters, add_format, read_chosen
from moe_trace.cli.pipes import TRACE
from moe_trace.data.display.json import json_text
from moe_trace.data.errors import UsageError
from moe_trace.read.ask import QUESTIONS, ask
from moe_trace.show.ask import plain_answers, render_answers

READS = {"path": TRACE, "other": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="trace (.json or .json.gz) or folder of traces")
    add("other", nargs="?", metavar="OTHER", help="second run of the same model, on different text")
    add(
        "-q",
        "--question",
        action="append",
        choices=tuple(QUESTIONS),
        metavar="NAME",
        help=f"answer only this question: {', '.join(QUESTIONS)}; may be given several times (default: all)",
    )
    add("--labels", metavar="A,B", help="names for the two runs (default: from their paths)")
    add_format(parser)
    add_filters(parser)


def run(arguments: argparse.Namespace) -> int:
    paths = [path for path in (arguments.path, arguments.other) if path is not None]
    labels = _labels(arguments.labels, paths)
    summary, *others = (read_chosen(path, arguments) for path in paths)
    answers = ask(
        summary,
        others[0] if others else None,
        questions=arguments.question or tuple(QUESTIONS),
        labels=labels,
    )
    if arguments.format == "json":
        print(json_text(plain_answers(answers)), end="")
    else:
        print(render_answers(answers), end="")
    return 0


def _labels(given: str | None, paths: list[str]) -> tuple[str, str]:
    if given is not None:
        labels = [part.strip() for part in given.split(",")]
        if len(paths) < 2:
            raise UsageError("--labels names two runs, and one path was given")
        if len(labels) != 2 or not all(labels) or labels[0] == labels[1]:
            raise UsageError(f"found --labels {given}, expected two different names such as code,prose")
        return labels[0], labels[1]
    names = [Path(path).resolve().name.split(".")[0] for path in paths]
    if len(names) < 2 or names[0] == names[1]:
        return "A", "B"
    equal = [a == b for a, b in zip(*names, strict=False)]
    shared = re.sub(
        r"[^_.-]*$", "", names[0][: [*equal, False].index(False)]
    )  # `h100_` in `h100_a` and `h100_b`
    a, b = (name[len(shared) :] or name for name in names)
    return a, b
