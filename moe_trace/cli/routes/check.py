"""Check that routes are possible decisions of a router.

Ids must be in range and differ within a token, no layer may be filled with zeros or hold another layer's
rows, no row may be stale, and padding must be marked. With --reference, layers are compared with those of
another file of the same tokens, to find an offset between layers. The exit status is 1 if anything is
wrong.

Example: moe-trace routes check runs/demo/trace.routes.npz
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moe_trace.cli.arguments import add_format, print_results
from moe_trace.cli.routes.reading import ROUTES, named, routes_of
from moe_trace.data.errors import TraceFileError

if TYPE_CHECKING:
    from moe_trace.read.routes.check import RoutesProblem


READS = {"files": ROUTES, "reference": ROUTES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="routes files")
    add("--reference", metavar="FILE", help="routes of the same tokens whose layers are known to be correct")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.read.routes.check import RoutesProblem, check_routes

    reference = routes_of(arguments.reference, arguments) if arguments.reference else None
    results: dict[str, dict[str, list[RoutesProblem]]] = {}
    for path in arguments.files:
        try:
            routes = routes_of(path, arguments)
        except TraceFileError as error:
            if len(arguments.files) == 1:
                raise
            results[named(path, arguments)] = {"file_can_be_read": [RoutesProblem.of_file(str(error))]}
            continue
        results[named(path, arguments)] = check_routes(routes, reference)
    return print_results(results, arguments.format)
