"""Read what a trace says about the routing. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from moe_trace.read.analysis import TraceSummary, analyse
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.opening import Progress
from moe_trace.read.file.trace_file import read_recording
from moe_trace.read.reduced.inputs import find_inputs
from moe_trace.read.time.peaks import PeakOverride

__all__ = ["Filter", "PeakOverride", "TraceSummary", "read_recording", "read_summary"]


def read_summary(
    path: str | Path,
    *,
    chosen: Filter | None = None,
    peak: PeakOverride | None = None,
    progress: Progress | None = None,
) -> TraceSummary:
    """The figures of a trace, or of all traces in a folder taken together.

    Args:
        path: a `.json` or `.json.gz` file, or a folder.
        chosen: only these layers, steps and stages.
        peak: the device's peaks, where the built-in table lacks or misses them.
        progress: called with bytes read and bytes in all of the file under way.

    Raises:
        TraceFileError: missing, empty, truncated, not JSON, of another tool, or without moe_trace data.
        UsageError: `chosen` leaves nothing.
    """
    return analyse(find_inputs(path), label=str(path), chosen=chosen, peak=peak, progress=progress)
