"""List the routers that would be traced in a model, without running it.

The model is built without weights, so that models of any size fit. Routers that differ only in their layer
share a row; the legend below the table explains what they are and how they are read.

Example: moe-trace routers demo
"""

from __future__ import annotations

import argparse
import sys

from moe_trace.cli.arguments import add_format

READS = {"model": ".json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "demo model of this package, Hugging Face Hub id, folder, or config.json"
    parser.add_argument("model", metavar="demo|HUB_ID|PATH|CONFIG.json", help=known)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.find.registry import CONTRACTS
    from moe_trace.find.routers import find_routers
    from moe_trace.show.routers import render_routers, render_routers_json
    from moe_trace.workload.models import load_model

    model, _ = load_model(arguments.model, device="meta", random_weights=True)
    routers = [site.info for site in find_routers(model)]
    if arguments.format == "json":
        sys.stdout.write(render_routers_json(type(model).__name__, routers))
    else:
        contracts = {contract.name: contract.description for contract in CONTRACTS}
        sys.stdout.write(render_routers(type(model).__name__, routers, contracts))
    return 0
