"""Files of routes as the commands read them: what a file lacks is said on standard error."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

from moe_trace.data.display.tables import printable

if TYPE_CHECKING:  # `--help` needs no numpy
    from moe_trace.data.routes.columns import RecordedRoutes

ROUTES = ".routes.npz"
"""How the copy of a pipe's content is named."""


def routes_of(path: str, arguments: argparse.Namespace) -> RecordedRoutes:
    """Read a file of routes, and say what it lacks."""
    from moe_trace.data.routes.file import IncompleteRoutes, read_routes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteRoutes)
        routes = read_routes(path)
    if routes.incomplete:
        shown = printable(arguments.copies.get(path, path), 200)
        print(f"moe-trace: note: {shown}: {routes.incomplete}", file=sys.stderr)
    return routes


def named(path: str, arguments: argparse.Namespace) -> str:
    """The name that the user gave."""
    return str(arguments.copies.get(path, path))
