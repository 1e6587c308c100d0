"""Find and load the inputs of a report: traces, or reduced traces that replace them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moe_trace.data.errors import TraceFileError
from moe_trace.read.file.folder import REDUCED_SUFFIX, find_traces, visible_files
from moe_trace.read.file.opening import Progress
from moe_trace.read.reduced.file import is_reduced, read_reduced, reduced_path, trace_of
from moe_trace.read.reduced.trace import ReducedTrace, reduce_file


def find_inputs(path: str | Path) -> list[Path]:
    """Return the file itself, or the file to read for each trace below a folder, sorted by trace.

    That is the reduced trace if it matches the trace's current bytes, or if the trace no longer exists.

    Raises:
        TraceFileError: There is no trace.
    """
    path = Path(path)
    reduced = [file for file in visible_files(path) if is_reduced(file)] if os.path.isdir(path) else []
    if not reduced:
        return find_traces(path)
    try:
        traces = find_traces(path)
    except TraceFileError:
        traces = []
    by_trace: dict[Path, list[Path]] = {}
    for file in reduced:
        by_trace.setdefault(trace_of(file), []).append(file)
    found = {trace: [_file_to_read(trace, by_trace.get(trace, ()))] for trace in traces}
    without_trace = {trace: files for trace, files in by_trace.items() if trace not in found}
    return [file for _, files in sorted((found | without_trace).items()) for file in files]


def quickest(trace: Path) -> Path:
    """Return the reduced form of one trace if it matches the trace's current bytes, else the trace."""
    reduced_files = trace.parent.glob(f"*{REDUCED_SUFFIX}")
    return _file_to_read(trace, [file for file in reduced_files if trace_of(file) == trace])


def _file_to_read(trace: Path, reduced: Sequence[Path]) -> Path:
    """Return the reduced file that matches the trace's current bytes, else the trace."""
    if not reduced:
        return trace
    try:
        name = reduced_path(trace)
    except OSError:  # opening it will report the error
        return trace
    return name if name in reduced else trace


def load(path: Path, progress: Progress | None = None) -> list[ReducedTrace]:
    """Load the ranks of one input.

    Raises:
        TraceFileError: The file cannot be read.
    """
    if not is_reduced(path):
        return list(reduce_file(path, progress))
    try:
        return read_reduced(path)
    except TraceFileError:
        trace = trace_of(path)
        if trace == path or not os.path.isfile(trace):
            raise
        return list(reduce_file(trace, progress))  # the reduced file is of another release, or damaged
