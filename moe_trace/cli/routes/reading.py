"""Files of routes as the commands read them: what a file lacks is said on standard error."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from moe_trace.data.display.tables import printable

if TYPE_CHECKING:  # `--help` needs no numpy
    from moe_trace.data.routes.columns import RecordedRoutes

ROUTES = ".routes.npz"
"""How the copy of a pipe's content is named."""


def routes_of(path: str, arguments: argparse.Namespace) -> RecordedRoutes:
    """Read a file of routes, or a capture whose ending says its form, and say what it lacks."""
    from moe_trace.data.routes.file import IncompleteRoutes, read_routes
    from moe_trace.read.routes.interchange.files import ENDINGS, import_routes

    if Path(path).suffix in ENDINGS and not path.endswith(".npz"):
        routes, notes = import_routes(path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteRoutes)
            routes = read_routes(path)
        notes = [routes.incomplete] if routes.incomplete else []
    for note in notes:
        print(f"moe-trace: note: {printable(named(path, arguments), 200)}: {note}", file=sys.stderr)
    return routes


def named(path: str, arguments: argparse.Namespace) -> str:
    """The name that the user gave."""
    return str(arguments.copies.get(path, path))
