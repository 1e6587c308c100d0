"""Find what we need in a trace's bytes, without parsing it: our ranges, the clock's base, the window."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import METADATA_KEY, RANGE_NAME, RANGE_PREFIX, RangeKind, Span

_CHUNK = 2**20  # read and searched while it is in the processor's cache
_EVENT_MAX = 64 * 2**10  # bytes of one event; ours are below 1 KiB
_HEAD = 2**20
_TAIL = 64 * 2**10
_BASE_TIME = re.compile(rb'"baseTimeNanoseconds"\s*:\s*(\d+)')
_SPLICE = re.compile(
    rb'"splice":\{"events_offset":(\d+),"events_bytes":(\d+),"key_offset":(\d+),"suffix_bytes":(\d+)\}\}'
)
# What stands in the data of merged ranks (`read/file/parts.py`), shortly before the offsets.
_SEVERAL_RANKS = re.compile(rb'"missing":\[[\d,]*\],"left_out":\{')
KEY_PREFIX = f',\n"{METADATA_KEY}": '.encode()
_DECODER = json.JSONDecoder()
# An annotation as Kineto writes it; any other layout is parsed as JSON, which takes ten times as long.
_KINETO_STYLE = re.compile(rb'"cat": "\w+", "name": "')
_KINETO_EVENT = re.compile(
    rb'\{\s*"ph": "X", "cat": "((?:gpu_)?user_annotation)", "name": "([^"\\]+)", "pid": (\d+), "tid": (\d+),'
    rb'\s*"ts": ([\d.]+), "dur": ([\d.]+),\s*"args": \{\s*"External id": (\d+)[,\s}]'
)


@dataclass(frozen=True)
class RangeEvent:
    """One of our ranges in a trace, on the host or (as the annotation of its kernels) on a device."""

    kind: RangeKind
    site: str
    span: Span
    pid: Any
    tid: Any
    external_id: Any
    on_device: bool


@dataclass(frozen=True)
class TraceTail:
    """Where a trace's `traceEvents` and its last `}` end, as offsets in the file."""

    events_end: int
    """Just after the last event."""
    empty: bool
    """Whether there is no event at all."""
    object_end: int
    """Just after the last value of the top-level object."""
    window: Span | None
    """What the profiler recorded, from its own span event."""


def read_base_time_ns(file: BinaryIO) -> int:
    """The `baseTimeNanoseconds` that event times count from; 0 where a trace has none."""
    file.seek(0)
    head = file.read(_HEAD)
    if b'"traceEvents"' not in head and not head.lstrip().startswith(b"{"):
        found = head[:40].decode("utf-8", "replace").strip() or "an empty file"
        raise TraceFileError(
            f"{file.name}: expected the Chrome trace JSON of torch.profiler, found {found!r}; "
            "give the .json or .json.gz file that prof.export_chrome_trace wrote"
        )
    match = _BASE_TIME.search(head)
    if match is None:  # other tools write their keys behind the events
        file.seek(max(0, file.seek(0, 2) - _HEAD))
        match = _BASE_TIME.search(file.read())
    return int(match.group(1)) if match else 0


def scan_ranges(file: BinaryIO) -> Iterator[RangeEvent]:
    """Our ranges in the order of the file, read through one buffer of a fixed size."""
    needle = _needle(file)
    file.seek(0)
    # What is kept of the block before: the bytes before a name, and a name's event cut by the block's end.
    buffer = bytearray(2 * _EVENT_MAX + _CHUNK)
    window = memoryview(buffer)
    filled = searched = 0
    while read := file.readinto(window[filled : filled + _CHUNK]):  # type: ignore[attr-defined]
        filled += read
        limit = filled if read < _CHUNK else max(searched, filled - _EVENT_MAX)
        position = buffer.find(needle, searched, limit)
        while position >= 0:
            event = _event_around(buffer, position, filled)
            if event is not None:
                yield event
            position = buffer.find(needle, position + len(needle), limit)
        kept_from = max(0, limit - _EVENT_MAX)
        window[: filled - kept_from] = bytes(window[kept_from:filled])
        filled, searched = filled - kept_from, limit - kept_from


def _needle(file: BinaryIO) -> bytes:
    """Our names as this file spells them: the longer the needle, the faster the search."""
    file.seek(0)
    head = file.read(_HEAD)
    prefix = RANGE_PREFIX.encode()
    if _KINETO_STYLE.search(head):
        return b'user_annotation", "name": "' + prefix
    spelling = max((b'"name": "', b'"name":"'), key=head.count)
    return (spelling if spelling in head else b'"') + prefix


def _event_around(buffer: bytearray, name_at: int, end: int) -> RangeEvent | None:
    """Parse the event whose name starts at `name_at`: the nearest `{` before it that parses as an event."""
    start = buffer.rfind(b"{", max(0, name_at - _EVENT_MAX), name_at)
    match = _KINETO_EVENT.match(buffer, max(0, start), end)
    if match is not None:
        return _annotation(match)
    start = name_at
    for _ in range(3):  # its own brace, or that of an `args` which stands before the name
        start = buffer.rfind(b"{", max(0, name_at - _EVENT_MAX), start)
        if start < 0:
            return None
        event = _decode_at(buffer, start, name_at, end)
        if event is not None and "ts" in event:
            return _range_event(event)
    return None


def _annotation(match: re.Match[bytes]) -> RangeEvent | None:
    category, name, pid, tid, start_us, duration_us, external_id = match.groups()
    named = RANGE_NAME.fullmatch(name.decode("utf-8", "replace"))
    if named is None:
        return None
    return RangeEvent(
        kind=named.group(1),  # type: ignore[arg-type]
        site=named.group(2),
        span=Span(float(start_us), float(duration_us)),
        pid=int(pid),
        tid=int(tid),
        external_id=int(external_id),
        on_device=category.startswith(b"gpu_"),
    )


def _decode_at(buffer: bytearray, start: int, name_at: int, end: int) -> dict[str, Any] | None:
    for length in (1024, _EVENT_MAX):  # nearly all of our events are short
        text = buffer[start : min(end, name_at + length)].decode("utf-8", "replace")
        try:
            return _DECODER.raw_decode(text)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _range_event(event: dict[str, Any]) -> RangeEvent | None:
    match = RANGE_NAME.fullmatch(str(event.get("name")))
    category = event.get("cat")
    if match is None or event.get("ph") != "X" or category not in ("user_annotation", "gpu_user_annotation"):
        return None
    arguments = event.get("args")
    return RangeEvent(
        kind=match.group(1),  # type: ignore[arg-type]
        site=match.group(2),
        span=Span(float(event["ts"]), float(event.get("dur", 0.0))),
        pid=event.get("pid"),
        tid=event.get("tid"),
        external_id=arguments.get("External id") if isinstance(arguments, dict) else None,
        on_device=category == "gpu_user_annotation",
    )


def read_tail(file: BinaryIO) -> TraceTail:
    """Locate the splice points from the end of the file.

    Raises:
        TraceFileError: the file is truncated, not a trace, or was merged before.
    """
    size = file.seek(0, 2)
    start = max(0, size - _TAIL)
    file.seek(start)
    tail = file.read()
    close = tail.rstrip()
    if not close.endswith(b"}"):
        raise TraceFileError(_truncated(file, tail))
    bracket = _events_bracket(tail)
    if bracket is None:
        raise TraceFileError(_truncated(file, tail))
    before = tail[:bracket].rstrip()
    if not before:
        raise TraceFileError(_truncated(file, tail))
    object_end = len(close[:-1].rstrip())
    return TraceTail(
        events_end=start + len(before),
        empty=before.endswith(b"["),
        object_end=start + object_end,
        window=_window(before),
    )


def _events_bracket(tail: bytes) -> int | None:
    """Offset of the `]` that closes traceEvents: what follows it must complete a JSON object."""
    position = tail.rfind(b"]")
    while position >= 0:
        try:
            rest = json.loads(b'{"traceEvents":[' + tail[position:])
        except (ValueError, RecursionError):
            rest = None
        opened = tail[:position].rstrip()
        if isinstance(rest, dict) and opened.endswith((b"}", b"[")) and not _is_another_array(opened):
            return position
        position = tail.rfind(b"]", 0, position)
    return None


def _is_another_array(opened: bytes) -> bool:
    """Whether the array that ends here began after the last event: a key of the top level behind them."""
    start = max(opened.rfind(b'"ph"'), opened.rfind(b'"traceEvents"'))
    return start >= 0 and re.search(rb'\][^\[\]]*"[^"]*"\s*:\s*\[\s*\{', opened[start:]) is not None


def _window(events: bytes) -> Span | None:
    """The span that Kineto writes last, for the whole recording: `PyTorch Profiler (0)`."""
    position = events.rfind(b'"PyTorch Profiler (0)"')
    start = events.rfind(b"{", 0, position)
    if position < 0 or start < 0:
        return None
    try:
        event, _ = _DECODER.raw_decode(events[start:].decode("utf-8", "replace"))
        return Span(float(event["ts"]), float(event["dur"]))
    except (ValueError, KeyError, TypeError):
        return None


def _truncated(file: BinaryIO, tail: bytes) -> str:
    end = tail[-40:].decode("utf-8", "replace").strip()
    return (
        f"{file.name}: expected a complete Chrome trace JSON object that holds `traceEvents`, but it ends in "
        f"{end!r}; the file is truncated or of another tool - export it again"
    )


@dataclass(frozen=True)
class Splice:
    """What merging added to a file, as offsets in it: the bytes without both are the trace as it was."""

    events_offset: int
    events_bytes: int
    key_offset: int
    suffix_bytes: int
    """Bytes of the original trace after the key."""
    several_ranks: bool = False
    """Whether the file is a merged trace of several ranks, whose events no longer stand apart."""


def read_splice(file: BinaryIO, *, strict: bool = False) -> Splice | None:
    """Where an earlier merge added to this file; None for a trace that was never merged.

    Raises:
        TraceFileError: with `strict`, for a merged trace that was changed since; None without.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    found = list(_SPLICE.finditer(tail))
    if not found:
        return None
    several = _SEVERAL_RANKS.search(tail[: found[-1].start()]) is not None
    events_offset, events_bytes, key_offset, suffix_bytes = map(int, found[-1].groups())
    splice = Splice(events_offset, events_bytes, key_offset, suffix_bytes, several)
    if not _is_true(file, splice, size):
        if not strict:
            return None
        raise TraceFileError(
            f"{file.name}: was merged by moe_trace and then changed by another tool, so that what was added "
            "can no longer be told from the trace; merge into the original trace instead"
        )
    return splice


def _is_true(file: BinaryIO, splice: Splice, size: int) -> bool:
    """Whether our additions stand where the file says."""
    if not splice.events_offset + splice.events_bytes <= splice.key_offset < size - splice.suffix_bytes:
        return False
    file.seek(splice.key_offset)
    key_is_ours = file.read(len(KEY_PREFIX)) == KEY_PREFIX
    file.seek(splice.events_offset)
    return key_is_ours and (not splice.events_bytes or file.read(64).lstrip(b",\n").startswith(b'{"ph":"M"'))


def trace_path_error(path: Path, error: OSError) -> TraceFileError:
    """The error for a trace that cannot be opened."""
    return TraceFileError(f"{path}: cannot be read ({error.strerror}); give the path of an existing trace")
