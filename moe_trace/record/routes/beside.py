"""Writing of routes to a file next to a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from moe_trace.data.errors import OutputError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.reader import SUFFIX
from moe_trace.record.forward.isolation import warn_user
from moe_trace.record.routes.recorder import RoutesRecorder


def end_routes(recorder: RoutesRecorder | None, routes: Callable[[], RecordedRoutes]) -> None:
    """Finish the file that routes are streamed to, if any; see `write_beside` for the arguments."""
    if recorder is not None and recorder.stream is not None:
        routes()
        recorder.stream.close()


def write_beside(
    trace: str | Path | None, recorder: RoutesRecorder | None, routes: Callable[[], RecordedRoutes]
) -> str | None:
    """Write routes to `<stem>.routes.npz` next to a trace; return the file's path relative to the trace.

    Streamed routes are already in a file, whose path is returned. If routes cannot be written, a warning is
    issued and None returned, since the trace is complete without them.

    Args:
        recorder: recorder of the routes; None if no routes are recorded.
        routes: returns all recorded routes.
    """
    if trace is None or recorder is None:
        return None
    path = Path(trace)
    try:
        found = routes()
        if recorder.stream is not None:
            return os.path.relpath(recorder.stream.path, path.parent)
        path = path.with_name(path.name.removesuffix(".gz").removesuffix(".json") + SUFFIX)
        found.save(path)
    except OutputError as error:
        warn_user(f"{trace} has no routes: {error}")
        return None
    return path.name
