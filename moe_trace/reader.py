"""Read what a trace says about the routing. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from moe_trace.reading.launches import find_kernels, router_busy_us
from moe_trace.reading.trace_file import Progress, find_traces, read_recording, read_trace
from moe_trace.summary import Summary, summarize

__all__ = ["read_recording", "read_summary"]


def read_summary(path: str | Path, *, progress: Progress | None = None) -> Summary:
    """The figures of a trace, or of the traces in a folder.

    Raises:
        TraceFileError: missing, empty, truncated, not JSON, of another tool, or without moe_trace data.
    """
    [file] = find_traces(path)
    trace = read_trace(file, progress)
    busy = router_busy_us(trace.recording.samples, trace.events, find_kernels(trace.events))
    return summarize(trace.recording, trace=str(path), device_busy_us=busy)
