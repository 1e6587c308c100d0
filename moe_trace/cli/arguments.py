"""Arguments shared by the commands that read traces: filters, progress bar, protection of existing files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_trace.data.display.json import json_text
from moe_trace.data.display.tables import printable, wrapped
from moe_trace.data.errors import OutputError, TraceFileError, UsageError
from moe_trace.data.schema import STAGES

if TYPE_CHECKING:  # these imports are slow, and `--help` does not need them
    from moe_trace.read.analysis import TraceSummary
    from moe_trace.read.file.filters import Filter
    from moe_trace.read.file.opening import Progress
    from moe_trace.read.time.peaks import PeakOverride

_BROKEN_SHOWN = 5
"""Maximum number of violations printed per rule."""


def add_output(
    parser: argparse.ArgumentParser, metavar: str, help: str, *, name: str = "--out", required: bool = False
) -> None:
    """Add `-o`, `--out` and `-f`, `--force`, which are the same in all commands that write."""
    add = parser.add_argument
    add("-o", name, type=Path, required=required, metavar=metavar, help=help)
    add("-f", "--force", action="store_true", help=f"replace {metavar} if it exists")


def add_format(
    parser: argparse.ArgumentParser,
    *more: str,
    alias: bool = False,
    help: str = "output format (default: text)",
) -> None:
    """Add `--format` with text, JSON and any further choices.

    Args:
        alias: also add `--json`.
    """
    parser.add_argument("--format", choices=("text", "json", *more), default="text", help=help)
    if alias:
        same = "same as --format json"
        parser.add_argument("--json", action="store_const", const="json", dest="format", help=same)


def parse_names(text: str | None) -> list[str]:
    """Split at commas: `a, b` gives ["a", "b"]."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def parse_numbers(option: str, text: str | None, most: int | None = None) -> tuple[int, ...]:
    """Parse distinct numbers: `8,16,8` gives (8, 16).

    Raises:
        UsageError: these are not integers from 1 to `most`.
    """
    parts = parse_names(text)
    end = 10**9 if most is None else most
    if not parts or not all(part.isdecimal() and 1 <= int(part[:10]) <= end for part in parts):
        limit = "on" if most is None else f"to {most}"
        raise UsageError(f"found {option} {text}, expected whole numbers from 1 {limit} such as 8,16,32")
    return tuple(dict.fromkeys(map(int, parts)))


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the options that select calls and those that set the device's peaks."""
    add_choice(parser)
    add = parser.add_argument
    add(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="peak throughput of the device in TFLOP/s (default: from a built-in table)",
    )
    add(
        "--peak-gbps",
        type=float,
        metavar="X",
        help="peak memory bandwidth of the device in GB/s (default: from a built-in table)",
    )


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the options that select calls."""
    add = parser.add_argument
    add("--layer", metavar="3,L05", help="include only these layers: indices, labels or module paths")
    add("--step", metavar="0,4-7", help="include only these steps")
    add(
        "--stage",
        "--phase",
        dest="stage",
        choices=STAGES,
        help="include only calls in this stage of the model's work (older name: --phase)",
    )


def chosen_filter(arguments: argparse.Namespace) -> Filter:
    """Return the filter described by the options."""
    from moe_trace.read.file.filters import Filter

    # `03` and `3` are the same layer index.
    layers = frozenset(str(int(name)) if name.isdecimal() else name for name in parse_names(arguments.layer))
    stages = frozenset([arguments.stage]) if arguments.stage else frozenset()
    return Filter(layers=layers, steps=parse_steps(arguments.step), stages=stages)


def chosen_peak(arguments: argparse.Namespace) -> PeakOverride:
    """Return the peaks given by the options."""
    from moe_trace.read.time.peaks import PeakOverride

    for value in (arguments.peak_tflops, arguments.peak_gbps):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"found a peak of {value:g}, expected a number above 0")
    return PeakOverride(arguments.peak_tflops, arguments.peak_gbps)


def read_chosen(path: str, arguments: argparse.Namespace) -> TraceSummary:
    """Return the summary of the selected calls of a trace or folder, named as the user named it."""
    from moe_trace.read.reader import read_summary

    with reading_progress() as progress:
        summary = read_summary(
            path, chosen=chosen_filter(arguments), peak=chosen_peak(arguments), progress=progress
        )
    original = arguments.copies.get(path)
    return summary if original is None else replace(summary, trace=original, files=(original,))


def parse_steps(text: str | None) -> frozenset[int]:
    """Parse steps and ranges: `0,4-7` gives {0, 4, 5, 6, 7}."""
    steps: set[int] = set()
    for part in (text or "").split(","):
        first, dash, last = part.strip().partition("-")
        if not first and not dash:
            continue
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 18:
            raise UsageError(f"found --step {text}, expected steps such as 3 or 0,4-7")
        end = int(last) if dash else int(first)
        if end - int(first) > 10_000_000:
            raise UsageError(f"found --step {text}, which is more steps than any trace holds")
        steps.update(range(int(first), end + 1))
    return frozenset(steps)


def print_results(results: Mapping[str, Mapping[str, Sequence[Any]]], form: str) -> int:
    """Print which rules each file keeps and what violates the others; return the exit code.

    Args:
        results: file -> rule -> its violations, each with a `sentence`.
    """
    if form == "json":
        print(json_text(results), end="")
    for file, rules in results.items() if form == "text" else ():
        print(printable(file, 200))
        for rule, found in rules.items():
            count = f": {len(found)}" if found else ""
            print(f"  {'BROKEN' if found else 'ok    '}  {rule.replace('_', ' ')}{count}")
            for problem in found[:_BROKEN_SHOWN]:
                print(wrapped(printable(problem.sentence, 500)))
            if len(found) > _BROKEN_SHOWN:
                print(wrapped(f"… and {len(found) - _BROKEN_SHOWN} more"))
    return int(any(found for rules in results.values() for found in rules.values()))


def refuse_to_replace(target: Path, *, force: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Raise `OutputError` before any work is done if the output file could not be written.

    Args:
        inputs: files or folders that the same command reads. They are never replaced, even with `force`.
    """
    if any(_is_among(target, Path(given)) for given in inputs):
        raise OutputError(f"{target} is what this command reads; choose another name for what it writes")
    if target.exists() and not force:
        raise OutputError(f"{target} exists; choose another name, or add --force to replace it")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder; make it first")


def _is_among(target: Path, given: Path) -> bool:
    if not target.exists() or not given.exists():
        return False
    if given.is_dir():
        from moe_trace.read.file.folder import REDUCED_SUFFIX, find_traces, visible_files

        try:
            small = [file for file in visible_files(given) if file.name.endswith(REDUCED_SUFFIX)]
            return any(map(target.samefile, small)) or any(map(target.samefile, find_traces(given)))
        except (TraceFileError, OSError):
            return False
    return target.samefile(given)


@contextmanager
def reading_progress() -> Iterator[Progress | None]:
    """Yield a progress callback for `read_summary`, or None if standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from moe_trace.data.display.progress import progress_bar

    with progress_bar(in_bytes=True) as tell:
        yield lambda done, total: tell("reading", done, total)
