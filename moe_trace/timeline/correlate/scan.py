"""Search a trace's events, without parsing them, for moe_trace's ranges and the time they cover."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from moe_trace.data.schema import RANGE_NAME, RANGE_PREFIX, RangeKind, Span
from moe_trace.data.trace_json import windows
from moe_trace.data.trace_json.stream import events_as
from moe_trace.data.trace_json.windows import EventBytes, Window

_SAMPLE_BYTES = 256 * 2**10
_TAIL_BYTES = 64 * 2**10
_ANY_NAME = b'"' + RANGE_PREFIX.encode()
_PROFILER_SPAN = re.compile(rb'"PyTorch Profiler \(\d+\)"')
# Text between the category of an event and its name.
_SPELLING = re.compile(rb'"cat"\s*:\s*"\w+"(\s*,\s*"name"\s*:\s*)"')
_DECODER = json.JSONDecoder()
_CATEGORIES = ("user_annotation", "gpu_user_annotation")
# An annotation as Kineto writes it; any other layout is parsed as JSON, which is ten times as slow.
_KINETO_EVENT = re.compile(
    rb'\{\s*"ph": "X",\s*"cat": "((?:gpu_)?user_annotation)",\s*"name": "([^"\\]+)",\s*"pid": (\d+),'
    rb'\s*"tid": (\d+),\s*"ts": ([\d.]+),\s*"dur": ([\d.]+)\s*,\s*"args": \{\s*"External id": (\d+)[,\s}]'
)


class RangeEvent(msgspec.Struct, frozen=True, gc=False):
    """A range of moe_trace in a trace, on the host or (as the annotation of its kernels) on a device."""

    kind: RangeKind
    site: str
    span: Span
    pid: Any
    tid: Any
    external_id: Any
    on_device: bool


class RangeSearch:
    """Finds moe_trace's ranges, in the order of the file, among events passed window by window."""

    def __init__(self) -> None:
        self._names = b""
        self._found: list[RangeEvent] = []

    def __call__(self, window: Window) -> None:
        """Search the next window."""
        self._names = self._names or _spelled_prefix(window)
        self._found.extend(_ranges_in(window, self._names))

    def found(self, events: EventBytes) -> list[RangeEvent]:
        """Return the ranges, once all of these events were passed."""
        if not self._found and self._names != _ANY_NAME:  # spellings may differ from the first
            self._names = _ANY_NAME
            for window in events.windows():
                self(window)
        return self._found


def _spelled_prefix(window: Window) -> bytes:
    """Return the names' prefix as this file spells it: a longer search text makes the search faster."""
    spellings = set(_SPELLING.findall(window.buffer, window.since, min(window.filled, _SAMPLE_BYTES)))
    if len(spellings) != 1:
        return _ANY_NAME
    return b'user_annotation"%b"%b' % (spellings.pop(), RANGE_PREFIX.encode())


def _ranges_in(window: Window, names: bytes) -> Iterator[RangeEvent]:
    buffer = window.buffer
    end = min(window.until + len(names) - 1, window.filled)  # a name may extend past the end
    position = buffer.find(names, window.since, end)
    while position >= 0:
        event = _event_around(buffer, position, window.filled)
        if event is not None:
            yield event
        position = buffer.find(names, position + len(names), end)


def _event_around(buffer: bytearray, name_at: int, end: int) -> RangeEvent | None:
    """Parse the event whose name starts at `name_at`: the nearest `{` before it that parses as an event."""
    start = buffer.rfind(b"{", max(0, name_at - windows.EVENT_MAX), name_at)
    match = _KINETO_EVENT.match(buffer, max(0, start), end)
    if match is not None:
        return _annotation(match)
    start = name_at
    for _ in range(3):  # its own brace, or that of an `args` before the name
        start = buffer.rfind(b"{", max(0, name_at - windows.EVENT_MAX), start)
        if start < 0:
            return None
        event = decode_event(buffer, start, end)
        if event is not None and "ts" in event:
            return _range_event(event)
    return None


def _annotation(match: re.Match[bytes]) -> RangeEvent | None:
    category, name, pid, tid, start_us, duration_us, external_id = match.groups()
    kind_and_site = _kind_and_site(name)
    if kind_and_site is None:
        return None
    kind, site = kind_and_site
    span, on_device = Span(float(start_us), float(duration_us)), category != b"user_annotation"
    return RangeEvent(kind, site, span, int(pid), int(tid), int(external_id), on_device)


@functools.lru_cache(maxsize=1024)
def _kind_and_site(name: bytes) -> tuple[RangeKind, str] | None:
    match = RANGE_NAME.fullmatch(name.decode("utf-8", "replace"))
    return None if match is None else (match.group(1), match.group(2))  # type: ignore[return-value]


def decode_event(buffer: bytearray, start: int, end: int) -> dict[str, Any] | None:
    """Decode the JSON object at a brace; None if it is invalid, too long, or incomplete at `end`."""
    for length in (2048, windows.EVENT_MAX):  # nearly all events are short
        try:
            text = buffer[start : min(end, start + length)].decode("utf-8", "replace")
            return _DECODER.raw_decode(text)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _range_event(event: dict[str, Any]) -> RangeEvent | None:
    kind_and_site = _kind_and_site(str(event.get("name")).encode("utf-8", "replace"))
    category = event.get("cat")
    if (
        kind_and_site is None
        or event.get("ph") != "X"
        or category not in ("user_annotation", "gpu_user_annotation")
    ):
        return None
    arguments = event.get("args")
    return RangeEvent(
        *kind_and_site,
        span=Span(float(event["ts"]), float(event.get("dur", 0.0))),
        pid=event.get("pid"),
        tid=event.get("tid"),
        external_id=arguments.get("External id") if isinstance(arguments, dict) else None,
        on_device=category == "gpu_user_annotation",
    )


# -- the time that the trace covers ---------------------------------------------------------------------


class _Timed(msgspec.Struct, gc=False):
    ph: str = "M"  # an event without a phase has no time
    cat: Any = None
    ts: float = 0.0
    dur: float = 0.0


def trace_window(events: EventBytes) -> Span | None:
    """Return the time span of the trace; None without events.

    It is the profiler's own span, which Kineto writes last, else from the first event to the last.
    """
    last = max(events.start, events.end - _TAIL_BYTES)
    events.file.seek(last)
    window = _profiler_span(events.file.read(events.end - last))
    return window if window is not None else _span_of_events(events)


def _profiler_span(text: bytes) -> Span | None:
    for match in reversed(list(_PROFILER_SPAN.finditer(text))):
        start = text.rfind(b"{", 0, match.start())
        try:
            event, _ = _DECODER.raw_decode(text[max(0, start) :].decode("utf-8", "replace"))
            if event.get("ph") == "X" and event.get("cat") == "Trace":
                return Span(float(event["ts"]), float(event["dur"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None


def _span_of_events(events: EventBytes) -> Span | None:
    start, end = math.inf, -math.inf
    for event in events_as(_Timed, events):
        if event.ph == "X" and event.cat == "Trace":  # the profiler's own span, wherever a tool put it
            return Span(event.ts, event.dur)
        if event.ph != "M":
            start, end = min(start, event.ts), max(end, event.ts + event.dur)
    return Span(start, end - start) if start <= end else None
