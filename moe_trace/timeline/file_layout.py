"""Layout of a trace file: the position of its events, and the base of their timestamps."""

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
"""Range of bytes to remove: start, end."""


@dataclass(frozen=True, eq=False)
class TraceLayout:
    """Top level of a trace's JSON."""

    events: ArrayBounds
    base_time_ns: int
    """Base of event timestamps; 0 if the trace does not have it."""
    old_key: Cut | None = None
    """Top-level `moe_trace` key of older releases, with its separating comma."""
    old_value: bytes = b""

    def without(self, cuts: Sequence[Cut]) -> TraceLayout:
        """Return the layout after these bytes are removed."""
        start, end = (
            offset - sum(min(to, offset) - since for since, to in cuts if since < offset)
            for offset in (self.events.start, self.events.end)
        )
        return TraceLayout(replace(self.events, start=start, end=max(start, end)), self.base_time_ns)


def read_layout(file: BinaryIO, watch: Callable[[Window], None]) -> TraceLayout:
    """Read the top level of the file.

    Args:
        watch: called with the windows of the events on the way, so that they are read once.

    Raises:
        TraceFileError: the file is truncated, not JSON, or not a trace of torch.profiler.
    """
    file.seek(0)
    stream = JsonStream(file.read, file.name)
    events, base_time_ns = None, 0
    old_value, before = b"", None
    old_key: tuple[int | None, int] | None = None
    for key in stream.walk():
        if key == "traceEvents":
            events = stream.skip_objects(file, watch)
        elif key == "baseTimeNanoseconds" and not (events and base_time_ns):  # Kineto's comes first
            base_time_ns = base_time(stream.value())
        elif key == METADATA_KEY:
            old_value = stream.value()
            old_key = (before, stream.position)
        else:
            stream.skip()
        before = stream.position
    if events is None or not _is_event(file, events):
        raise TraceFileError(_no_trace(file))
    return TraceLayout(events, base_time_ns, _cut_of_key(file, old_key), old_value)


def _cut_of_key(file: BinaryIO, key: tuple[int | None, int] | None) -> Cut | None:
    """Return the key's bytes, from the end of the value before; for the first key, up to the next key."""
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
    """Return whether the array's first object is an event in the Chrome trace format."""
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
