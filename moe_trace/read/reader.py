"""Read routing metrics from traces. Does not import torch."""

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
    """Summarise a trace, or all traces in a folder together.

    Args:
        path: A `.json` or `.json.gz` file, or a folder.
        chosen: Layers, steps and stages to select.
        peak: The device's peaks, if the built-in table lacks them or is wrong.
        progress: Callback with the bytes read and the size of the current file.

    Raises:
        TraceFileError: Missing, empty, truncated, not JSON, from another tool, or without moe_trace data.
        UsageError: `chosen` leaves nothing.
    """
    return analyse(find_inputs(path), label=str(path), chosen=chosen, peak=peak, progress=progress)
