"""Export the routing of a trace for other tools.

csv and parquet have one row per router call with all of its metrics; perfetto is a native trace for
ui.perfetto.dev, with units; eplb is a [layers, experts] array of assignments for expert load balancers
(.npy, or JSON if FILE ends in .json).

Example: moe-trace export runs/demo --to parquet --out calls.parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_trace.cli.arguments import add_filters, add_output, read_chosen, refuse_to_replace
from moe_trace.cli.pipes import TRACE
from moe_trace.data.files import write_text
from moe_trace.read.reader import TraceSummary

SUFFIXES = {"csv": ".csv", "parquet": ".parquet", "perfetto": ".pftrace", "eplb": ".npy"}


READS = {"path": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="trace (.json or .json.gz) or folder of traces")
    add("--to", required=True, choices=tuple(SUFFIXES), help="output format, described above")
    add_output(
        parser, "FILE", "output file (default: PATH's name with another extension, in the current folder)"
    )
    add_filters(parser)


def run(arguments: argparse.Namespace) -> int:
    target = arguments.out or Path(_stem(arguments.path) + SUFFIXES[arguments.to])
    refuse_to_replace(target, force=arguments.force, inputs=[arguments.path])
    summary = read_chosen(arguments.path, arguments)
    _write(summary, arguments.to, target)
    print(f"wrote {target}", file=sys.stderr)
    return 0


def _stem(path: str) -> str:
    name = Path(path).resolve().name
    for ending in (".gz", ".json", ".trace", ".pt"):
        name = name.removesuffix(ending)
    return name or "trace"


def _write(summary: TraceSummary, form: str, target: Path) -> None:
    if form == "csv":
        from moe_trace.show.csv import render_csv

        write_text(target, render_csv([summary]))
    elif form == "parquet":
        from moe_trace.read.export import write_parquet

        write_parquet([summary], target)
    elif form == "eplb":
        from moe_trace.read.export import write_eplb

        write_eplb(summary, target)
    else:
        from moe_trace.read.perfetto import write_perfetto

        split = summary.experts_are_split
        write_perfetto(summary.samples, target, rank=summary.rank, experts_are_split=split)
