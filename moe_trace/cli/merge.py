"""Merge the traces of a run's ranks into one, with the ranks as processes on one clock.

Clocks are aligned using the collectives that the ranks share, and the remaining error is printed. Ranks that
are missing or cannot be read are named; the others are merged.

Example: moe-trace merge runs/ep2 --out merged.pt.trace.json.gz
"""

from __future__ import annotations

import argparse
import os
import sys

from moe_trace.cli.arguments import add_output, reading_progress, refuse_to_replace
from moe_trace.cli.pipes import TRACE
from moe_trace.data.display.tables import number_ranges, printable, wrapped
from moe_trace.data.errors import UsageError
from moe_trace.read.ranks.merge_plan import MergePlan, plan_merge
from moe_trace.read.ranks.merged_file import write_merged
from moe_trace.show.text.ranks import clock_lines

READS = {"paths": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="one trace per rank, or the folder with all of them")
    add_output(parser, "FILE", "output file, .json or .json.gz", required=True)


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if not out.name.endswith((".json", ".json.gz")):
        raise UsageError(f"found --out {out}, expected a name that ends in .json or .json.gz")
    files = [path for path in arguments.paths if not os.path.isdir(path)]  # plan_merge handles folders
    refuse_to_replace(out, force=arguments.force, inputs=files)
    with reading_progress() as progress:
        plan = plan_merge(arguments.paths, out, progress)
        merged = write_merged(plan, out, progress)
    for warning in _warnings(plan):
        print(f"moe-trace: warning: {warning}", file=sys.stderr)
    ranks = ", ".join(str(part.rank) for part in merged.parts)
    print(f"{out}: ranks {ranks} on one clock")
    print("\n".join(wrapped(line) for line in clock_lines(merged.alignment)))
    return 0


def _warnings(plan: MergePlan) -> list[str]:
    warnings = [f"{printable(file, 200)} was left out: {why}" for file, why in plan.left_out.items()]
    if plan.missing:
        world_size = max(trace.recording.world_size for trace in plan.ranks)
        missing = ", ".join(number_ranges(plan.missing))
        warnings.append(
            f"world_size is {world_size}, but {len(plan.ranks)} ranks were found; no trace of rank {missing}"
        )
    return warnings
