"""Export routes for other tools.

npy is [tokens, layers, top_k] as returned by vLLM, with -1 for no expert; npz has the other columns as well;
megatron is a router trace; parquet, arrow and safetensors have all columns and can be imported again.

Example: moe-trace routes export runs/demo/trace.routes.npz --to parquet --out routes.parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_trace.cli.arguments import add_output, refuse_to_replace
from moe_trace.cli.routes.reading import ROUTES, named, routes_of

READS = {"file": ROUTES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="routes file")
    formats = ("npy", "npz", "megatron", "parquet", "arrow", "safetensors")
    add("--to", required=True, choices=formats, help="output format, described above")
    add_output(
        parser, "FILE", "output file (default: FILE's name with another extension, in the current folder)"
    )


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.read.routes.interchange.files import FORMATS, export_routes

    name = Path(named(arguments.file, arguments)).name.removesuffix(ROUTES)
    target = arguments.out or Path((name.strip("-") or "routes") + FORMATS[arguments.to])
    refuse_to_replace(target, force=arguments.force, inputs=[arguments.file])
    for note in export_routes(routes_of(arguments.file, arguments), target, arguments.to):
        print(f"moe-trace: note: {note}", file=sys.stderr)
    print(f"wrote {target}", file=sys.stderr)
    return 0
