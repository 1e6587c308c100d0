"""Find trace files in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from moe_trace.data.errors import TraceFileError
from moe_trace.read.file.worker_names import is_frontend

TRACE_SUFFIXES = (".json", ".json.gz")
REDUCED_SUFFIX = ".moe_trace"
"""Suffix of reduced traces, the small files that replace traces in reports (`moe_trace.read.reduced`)."""
NO_EVENTS = "found reduced traces, which hold no events; give the traces themselves"


def find_traces(path: str | Path) -> list[Path]:
    """Return the path itself or the traces below a folder, sorted; frontends' only if there are no others.

    Raises:
        TraceFileError: There is no trace.
    """
    path = Path(path)
    if not os.path.isdir(path):  # also for strings that cannot be paths, which opening reports
        return [path]
    files = visible_files(path)
    traces = [f for f in files if f.name.endswith(tuple(f"trace{suffix}" for suffix in TRACE_SUFFIXES))]
    if not traces:  # files with names that the user chose
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
    """Return all regular files below a folder, sorted, without hidden ones: those that other systems leave
    beside a file (`._x`), and remains of interrupted merges."""
    files = sorted(folder.rglob("*"))
    visible = (f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    return [file for file in visible if file.is_file()]
