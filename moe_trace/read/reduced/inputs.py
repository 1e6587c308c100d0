"""What a report reads: traces, or the small files that answer for them."""

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
    """The file itself, or for each trace below a folder what is read for it, by the trace's name.

    That is the reduced trace where there is one of just these bytes, or where the trace is gone.

    Raises:
        TraceFileError: nothing is there.
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
    found = {trace: [_fresh(trace, by_trace.get(trace, ()))] for trace in traces}
    gone = {trace: files for trace, files in by_trace.items() if trace not in found}
    return [file for _, files in sorted((found | gone).items()) for file in files]


def quickest(trace: Path) -> Path:
    """What is read for one trace: what it was reduced to, where that is of the trace as it is now."""
    beside = trace.parent.glob(f"*{REDUCED_SUFFIX}")
    return _fresh(trace, [file for file in beside if trace_of(file) == trace])


def _fresh(trace: Path, reduced: Sequence[Path]) -> Path:
    """One of the small files, if it is of the trace as it is now; else the trace."""
    if not reduced:
        return trace
    try:
        name = reduced_path(trace)
    except OSError:  # who opens it says what is wrong
        return trace
    return name if name in reduced else trace


def load(path: Path, progress: Progress | None = None) -> list[ReducedTrace]:
    """The ranks of one input.

    Raises:
        TraceFileError: it cannot be read.
    """
    if not is_reduced(path):
        return list(reduce_file(path, progress))
    try:
        return read_reduced(path)
    except TraceFileError:
        trace = trace_of(path)
        if trace == path or not os.path.isfile(trace):
            raise
        return list(reduce_file(trace, progress))  # of another release, or damaged
