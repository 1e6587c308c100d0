"""What stands where in a trace's file: its events, and the clock that they count from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import METADATA_KEY
from moe_trace.data.trace_json.head import base_time
from moe_trace.data.trace_json.stream import JsonStream, loads_lenient
from moe_trace.data.trace_json.windows import ArrayBounds, Window

_FIRST_EVENT = 64 * 2**10
Cut = tuple[int, int]
"""Bytes to take out: from, to."""


@dataclass(frozen=True, eq=False)
class TraceLayout:
    """The top level of a trace's JSON."""

    events: ArrayBounds
    base_time_ns: int
    """What event times count from; 0 where the trace does not tell."""
    old_key: Cut | None = None
    """The top-level `moe_trace` of older releases, with the comma that sets it apart."""
    old_value: bytes = b""

    def without(self, cuts: Sequence[Cut]) -> TraceLayout:
        """The same once these bytes are gone."""
        start, end = (
            offset - sum(min(to, offset) - since for since, to in cuts if since < offset)
            for offset in (self.events.start, self.events.end)
        )
        return TraceLayout(replace(self.events, start=start, end=max(start, end)), self.base_time_ns)


def read_layout(file: BinaryIO, watch: Callable[[Window], None]) -> TraceLayout:
    """Walk the top level of the file.

    Args:
        watch: is shown the events on the way, so that they are read once.

    Raises:
        TraceFileError: the file is truncated, no JSON, or no trace of torch.profiler.
    """
    file.seek(0)
    stream = JsonStream(file.read, file.name)
    events, base_time_ns = None, 0
    old_value, before = b"", None
    old_key: tuple[int | None, int] | None = None
    for key in stream.walk():
        if key == "traceEvents":
            events = stream.skip_objects(file, watch)
        elif key == "baseTimeNanoseconds" and not (events and base_time_ns):  # Kineto's stands before them
            base_time_ns = base_time(stream.value())
        elif key == METADATA_KEY:
            old_value = stream.value()
            old_key = (before, stream.position)
        else:
            stream.skip()
        before = stream.position
    if events is None or not _is_event(file, events):
        raise TraceFileError(_no_trace(file))
    return TraceLayout(events, base_time_ns, _with_comma(file, old_key), old_value)


def _with_comma(file: BinaryIO, key: tuple[int | None, int] | None) -> Cut | None:
    """From the value before to its own end; as the first key, from the brace to the key that follows."""
    if key is None:
        return None
    before, end = key
    if before is not None:
        return before, end
    file.seek(0)
    start = file.read(_FIRST_EVENT).index(b"{") + 1
    file.seek(end)
    match = re.match(rb"\s*,", file.read(_FIRST_EVENT))
    return start, end + (match.end() if match else 0)


def _is_event(file: BinaryIO, events: ArrayBounds) -> bool:
    """Whether the array's first object is one of the Chrome trace format."""
    if events.empty:
        return True
    file.seek(events.start)
    stream = JsonStream(lambda size: file.read(min(size, _FIRST_EVENT)), file.name)
    first = loads_lenient(stream.value())
    return isinstance(first, dict) and "ph" in first


def _no_trace(file: BinaryIO) -> str:
    file.seek(0)
    found = file.read(40).decode("utf-8", "replace").strip()
    return (
        f"{file.name}: expected the Chrome trace JSON of torch.profiler, an object with events in "
        f"`traceEvents`, found {found!r}; give the .json or .json.gz file that prof.export_chrome_trace wrote"
    )
