"""`moe-trace check`."""

from __future__ import annotations

import argparse
from typing import ClassVar

from moe_trace.cli.arguments import reading_progress
from moe_trace.cli.pipes import TRACE
from moe_trace.data.display.json import json_text
from moe_trace.data.display.tables import printable, wrapped
from moe_trace.data.errors import TraceFileError
from moe_trace.read.check import Violation, check, read_checked
from moe_trace.read.file.folder import find_traces

_SHOWN = 5


class CheckCommand:
    """Check that a merged trace keeps its promises.

    Samples and ranges are accounted for, assignments add up to tokens·k - skipped, counters stand in their
    ranges, lanes don't cross. The exit status is 1 where a promise is broken.

    Example: moe-trace check runs/demo
    """

    reads: ClassVar[dict[str, str]] = {"paths": TRACE}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("paths", nargs="+", metavar="PATH", help="traces, or folders of traces")
        parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")

    def run(self, arguments: argparse.Namespace) -> int:
        """Check each file; print what is kept and what is broken."""
        results: dict[str, dict[str, list[Violation]]] = {}
        for path in arguments.paths:
            files = find_traces(path)
            for file in files:
                try:
                    with reading_progress() as progress:
                        results[str(file)] = check(read_checked(file, progress))
                except TraceFileError as error:
                    if len(files) == 1:
                        raise
                    unread = Violation(rule="file_can_be_read", where="file", message=str(error))
                    results[str(file)] = {"file_can_be_read": [unread]}
        if arguments.format == "json":
            print(json_text(results), end="")
        else:
            for name, rules in results.items():
                print("\n".join(_lines(name, rules)))
        broken = any(found for rules in results.values() for found in rules.values())
        return 1 if broken else 0


def _lines(file: str, rules: dict[str, list[Violation]]) -> list[str]:
    lines = [printable(file, 200)]
    for rule, found in rules.items():
        words = rule.replace("_", " ")
        lines.append(
            f"  {'ok    ' if not found else 'BROKEN'}  {words}" + (f": {len(found)}" if found else "")
        )
        lines += [wrapped(printable(f"{v.where}: {v.message}", 500)) for v in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(wrapped(f"… and {len(found) - _SHOWN} more"))
    return lines
