"""Which traces lie in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from moe_trace.data.errors import TraceFileError
from moe_trace.read.file.worker_names import is_frontend

TRACE_SUFFIXES = (".json", ".json.gz")
REDUCED_SUFFIX = ".moe_trace"
"""Of the small files that answer for traces (`moe_trace.read.reduced`)."""
NO_EVENTS = "found reduced traces, which hold no events; give the traces themselves"


def find_traces(path: str | Path) -> list[Path]:
    """The trace itself, or the traces below a folder, by name: of frontends only where there are no others.

    Raises:
        TraceFileError: nothing is there.
    """
    path = Path(path)
    if not os.path.isdir(path):  # false, too, for what is no possible name: who opens it says why
        return [path]
    files = visible_files(path)
    traces = [f for f in files if f.name.endswith(tuple(f"trace{suffix}" for suffix in TRACE_SUFFIXES))]
    if not traces:  # names that somebody chose
        traces = [f for f in files if f.name.endswith(TRACE_SUFFIXES) and f.parent == path]
    if not traces:
        if any(file.name.endswith(REDUCED_SUFFIX) for file in files):
            raise TraceFileError(f"{path}: {NO_EVENTS}")
        raise TraceFileError(
            f"{path}: found no trace (*.json, *.json.gz) in this folder; record one with "
            f"`moe-trace run --out {path}`, or give the file itself"
        )
    return [trace for trace in traces if not is_frontend(trace.name)] or traces


def visible_files(folder: Path) -> list[Path]:
    """All regular files below a folder, by name. Hidden are those that other systems leave beside a file
    (`._x`), and what an interrupted merge left."""
    files = sorted(folder.rglob("*"))
    shown = (f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    return [file for file in shown if file.is_file()]
