"""Check a trace with merged routing data for consistency.

Samples and ranges must be accounted for, assignments must add up to tokens·k - skipped, counters must lie
within their ranges, and slices of a lane must not overlap. The exit status is 1 if a rule is broken.

Example: moe-trace check runs/demo
"""

from __future__ import annotations

import argparse

from moe_trace.cli.arguments import add_format, print_results, reading_progress
from moe_trace.cli.pipes import TRACE
from moe_trace.data.errors import TraceFileError
from moe_trace.read.check import Violation, check, read_checked
from moe_trace.read.file.folder import find_traces

READS = {"paths": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="traces or folders of traces")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
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
    return print_results(results, arguments.format)
