"""The file of routes beside a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from moe_trace.data.errors import OutputError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.file import SUFFIX
from moe_trace.record.forward.isolation import warn_user
from moe_trace.record.routes.recorder import RoutesRecorder


def end_routes(recorder: RoutesRecorder | None, routes: Callable[[], RecordedRoutes]) -> None:
    """Recording ends: finish the file, where routes are streamed to one; arguments as of `write_beside`."""
    if recorder is not None and recorder.stream is not None:
        routes()
        recorder.stream.close()


def write_beside(
    trace: str | Path | None, recorder: RoutesRecorder | None, routes: Callable[[], RecordedRoutes]
) -> str | None:
    """Write routes to `<stem>.routes.npz` beside a trace; returns the file's name, relative to the trace.

    Routes that are streamed stand in a file already, which is named. A trace whose routes cannot be written
    is still a trace: that is said, and None returned.

    Args:
        recorder: None where no routes are recorded.
        routes: brings all that is recorded.
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
