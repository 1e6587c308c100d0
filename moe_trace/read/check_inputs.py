"""Inputs to the checks of a trace: the recording, all events, the added events, and the join coverage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moe_trace.data.schema import Recording, is_band
from moe_trace.data.trace_json.coverage import TimeCoverage
from moe_trace.data.trace_json.events import EventTable, to_ns
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.data.trace_json.stream import JsonStream, decoders, loads_lenient
from moe_trace.read.file.opening import Progress, open_trace_stream
from moe_trace.read.file.trace_file import read_trace, split_ranks
from moe_trace.read.ranks.collective_times import find_collectives, work_coverage
from moe_trace.read.time.phases import measure_calls


@dataclass(frozen=True)
class BandEvent:
    """A counter or slice that merging added."""

    ph: str
    name: str
    track: tuple[Any, Any]
    start_ns: int
    duration_ns: int
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Everything that the rules examine."""

    recording: Recording
    events: EventTable
    coverage: TimeCoverage
    """Coverage of all ranks in the file."""
    band: tuple[BandEvent, ...]


class _RawEvent(msgspec.Struct, gc=False):
    ph: str = ""
    name: str = ""
    pid: int | str | None = None
    tid: int | str | None = None
    ts: float = 0.0
    dur: float = 0.0
    args: msgspec.Raw = msgspec.Raw(b"null")


def read_checked(path: Path, progress: Progress | None = None) -> Checked:
    """Read a merged trace twice, for the profiler's events and for those that merging added.

    Raises:
        TraceFileError: See `read_trace`.
    """
    trace = read_trace(path, progress)
    with open_trace_stream(path, progress) as stream:
        band = tuple(_band_events(stream))
    coverage = TimeCoverage()
    for part in split_ranks(trace):
        kernels = find_kernels(part.events)
        coverage += measure_calls(part.recording.calls, part.events, kernels).coverage
        of_calls = work_coverage(find_collectives(part.recording.calls, part.events, kernels))
        coverage += TimeCoverage(collectives=of_calls)
    return Checked(recording=trace.recording, events=trace.events, coverage=coverage, band=band)


def _band_events(stream: JsonStream) -> Iterator[BandEvent]:
    for key in stream.walk():
        if key != "traceEvents":
            stream.skip()
            continue
        for batch in stream.batches(*decoders(_RawEvent)):
            band_events = [event for event in batch if is_band(event.pid) and event.ph in ("C", "X")]
            times_ns = to_ns([(event.ts, event.dur) for event in band_events]).tolist()
            for event, (start_ns, duration_ns) in zip(band_events, times_ns, strict=True):
                counter = event.ph == "C"
                track = event.pid, event.name if counter else event.tid
                value = _sum_of_numbers(bytes(event.args)) if counter else None
                yield BandEvent(event.ph, event.name, track, start_ns, duration_ns, value)


def _sum_of_numbers(text: bytes) -> float:
    try:
        arguments = loads_lenient(text)
    except ValueError:
        return math.nan
    numbers = arguments.values() if isinstance(arguments, dict) else ()
    return sum(float(v) for v in numbers if isinstance(v, (int, float)) and abs(v) < 1e300)
