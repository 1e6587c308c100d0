"""Compare two traces, or two folders of traces, and report what changed.

Load, entropy, latency, phases and FLOP/s are compared with a bootstrap over calls, so that noise is not
reported as a change. With --fail-on, the exit status is 1 if a real change exceeds a limit; a change that
cannot be distinguished from noise because there are too few calls (under 5) counts as real. Metrics cover
all layers together, or one layer: 'L03:router_entropy<-10%'.

Example: moe-trace diff runs/before runs/after --fail-on 'device_busy_p50>+5%'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moe_trace.cli.arguments import add_filters, add_format, read_chosen
from moe_trace.cli.pipes import TRACE
from moe_trace.data.display.json import json_text
from moe_trace.data.errors import UsageError
from moe_trace.read.diff import Change, Comparison, compare
from moe_trace.read.diff.conditions import Condition, missing, parse_condition
from moe_trace.read.diff.metrics import HOST_FLOOR, METRICS
from moe_trace.show.diff import plain_diff, render_diff_csv, render_diff_text, size_of

READS = {"a": TRACE, "b": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A", help="baseline trace or folder of traces (before)")
    add("b", metavar="B", help="trace or folder of traces to compare with A (after)")
    add_format(parser, "csv")
    add(
        "--fail-on",
        action="append",
        default=[],
        metavar="'METRIC>+5%'",
        help="exit with status 1 if this condition holds; may be given several times; metrics: "
        f"{', '.join(METRICS)}",
    )
    add(
        "--host-floor",
        type=float,
        default=100 * HOST_FLOOR,
        metavar="PERCENT",
        help="report a change of a time on the host's clock only if it exceeds this percentage; device times "
        f"have no such limit (default: {100 * HOST_FLOOR:.0f})",
    )
    add("--all", action="store_true", help="also show what did not change")
    add_filters(parser)


def run(arguments: argparse.Namespace) -> int:
    conditions = [parse_condition(text) for text in arguments.fail_on]
    if not 0 <= arguments.host_floor < float("inf"):
        raise UsageError(f"found --host-floor {arguments.host_floor:g}, expected a percentage from 0 on")
    sides = [read_chosen(path, arguments) for path in (arguments.a, arguments.b)]
    comparison = compare(*sides, host_floor=arguments.host_floor / 100)
    changes = comparison.changes
    unknown = [condition.text for condition in conditions if missing(condition, changes)]
    if unknown:
        raise UsageError(f"--fail-on {', '.join(unknown)}: the two recordings have no such figure to compare")
    failed = _failures(conditions, changes)
    print(_render(arguments, comparison, failed), end="")
    for condition, change in failed:
        where = f"{change.site}, {change.stage}, changed by {size_of(change)}"
        print(f"moe-trace: failed on {condition.text}: {where}", file=sys.stderr)
    return 1 if failed else 0


def _failures(conditions: Sequence[Condition], changes: Sequence[Change]) -> list[tuple[Condition, Change]]:
    """Return the violated conditions. A stage with few calls is judged only if no other stage can be."""
    compared = {(change.site, change.metric) for change in changes if change.verdict != "few calls"}
    judged = [c for c in changes if c.verdict != "few calls" or (c.site, c.metric) not in compared]
    return [(condition, change) for condition in conditions for change in judged if condition.fails(change)]


def _render(
    arguments: argparse.Namespace, comparison: Comparison, failed: Sequence[tuple[Condition, Change]]
) -> str:
    if arguments.format == "text":
        return render_diff_text(comparison, everything=arguments.all)
    if arguments.format == "csv":
        return render_diff_csv(comparison)
    plain = {**plain_diff(comparison), "failed": [condition.text for condition, _ in failed]}
    return json_text(plain)
