"""Read route files for the commands, and report on standard error what a file lacks."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from moe_trace.data.display.tables import printable
from moe_trace.data.errors import UsageError

if TYPE_CHECKING:  # `--help` needs no numpy
    import numpy as np

    from moe_trace.data.routes.columns import RecordedRoutes

ROUTES = ".routes.npz"
"""File extension of the copy of a piped input."""


def routes_of(path: str, arguments: argparse.Namespace) -> RecordedRoutes:
    """Read a file of routes, or a capture whose extension gives its format, and report what it lacks."""
    from moe_trace.data.routes.reader import IncompleteRoutes, read_routes
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


def predicted_ids(path: str) -> np.ndarray:
    """Return the token ids predicted by a model, one per row.

    Raises:
        UsageError: the file does not hold a one-dimensional array of integers.
    """
    import numpy as np

    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{printable(path, 200)}: no .npy array of predicted token ids ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "an archive of arrays"
        raise UsageError(f"{printable(path, 200)}: expected whole numbers, one for each row; found {found}")
    return ids


def named(path: str, arguments: argparse.Namespace) -> str:
    """Return the name that the user gave for an input."""
    return str(arguments.copies.get(path, path))
