"""Writing, finding and removing what merging adds to a trace file.

The recording is stored in the last event of `traceEvents`, the `process_labels` of the band's process:
metadata that every viewer supports, under an argument key that viewers ignore. Nothing is added after the
bracket that closes the events (docs/trace_format.md lists what each consumer needs).
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import msgspec

from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import METADATA_KEY, is_band
from moe_trace.data.trace_json.cursor import JsonCursor
from moe_trace.data.trace_json.stream import JsonStream, value_or_none
from moe_trace.data.trace_json.windows import Window
from moe_trace.timeline.file_layout import Cut, TraceLayout, read_layout

_COPY_BYTES = 4 * 2**20
_OWN_HEAD = re.compile(rb',?\n\{"ph":"M","name":"process_')
_SPLICE = re.compile(rb',"splice":\{"offset":(\d+),"band_bytes":(\d+),"event_bytes":(\d+)\}\}\}\}$')
_SPLICE_BYTES = 128
_SPLICED_END = re.compile(rb'("splice":\{"offset":(\d+),"band_bytes":\d+,"event_bytes":\d+\}\}\}\})\s*\]')
_TAIL_BYTES = 64 * 2**10
_MAYBE_OWN = re.compile(rb'"pid"\s*:\s*9\d{6}|"%b"' % METADATA_KEY.encode())


def encode_addition(
    band: bytes, label: dict[str, Any], recording: bytes, *, offset: int, first: bool = False
) -> bytes:
    """Return what merging writes after the last event.

    Args:
        band: events, without a comma at either end; may be empty.
        label: the `process_labels` event of the band's process.
        recording: JSON object.
        offset: its offset in the file.
        first: whether no event precedes it.
    """
    separator = b"\n" if first else b",\n"
    before = separator + band + b",\n" if band else separator
    carrier = _carrier(label)
    splice = b',"splice":{"offset":%d,"band_bytes":%d,"event_bytes":' % (offset, len(before))
    size = least = len(carrier) + len(recording) - 1 + len(splice) + len(b"}}}}")
    while least + len(str(size)) != size:
        size = least + len(str(size))
    return b"".join([before, carrier, recording[:-1], splice, str(size).encode(), b"}}}}"])


def _carrier(label: dict[str, Any]) -> bytes:
    """Return the event up to the recording."""
    return msgspec.json.encode(label)[:-2] + b',"%b":' % METADATA_KEY.encode()


def insert_addition(file: BinaryIO, offset: int, addition: bytes) -> None:
    """Insert the addition at an offset; if the disk is full, the file is left unchanged."""
    file.seek(offset)
    tail = file.read()
    try:
        file.seek(offset)
        file.write(addition)
        file.write(tail)
        file.flush()
    except OSError:
        _restore(file, offset, tail)
        raise


def _restore(file: BinaryIO, offset: int, tail: bytes) -> None:
    """Write back the original bytes, which fit because they were there before."""
    file.seek(offset)
    file.write(tail)
    file.truncate()
    file.flush()


def _find_addition(file: BinaryIO, end: int) -> tuple[int, int] | None:
    """Return the start of the addition that ends at `end`, including the comma before the band, and the start
    of its event with the recording; None if merging did not write it in this form."""
    start = max(0, end - _SPLICE_BYTES)
    file.seek(start)
    match = _SPLICE.search(file.read(end - start))
    if match is None:
        return None
    _, band_bytes, event_bytes = map(int, match.groups())
    event = end - event_bytes
    start = event - band_bytes
    if start < 0 or not band_bytes:
        return None
    file.seek(start)
    return (start, event) if _OWN_HEAD.match(file.read(64)) else None


def remove_additions(file: BinaryIO, watch: Callable[[Window], None]) -> TraceLayout:
    """Remove what an earlier merge added; unless another tool saved the file since, the bytes that remain are
    those that the profiler wrote.

    Args:
        watch: as in `read_layout`; it also sees the additions.

    Raises:
        TraceFileError: as in `read_layout`, or the file is a merged trace of several ranks.
    """
    layout = read_layout(file, watch)
    cuts = sorted(_own_cuts(file, layout))
    if not cuts:
        return layout
    _remove_cuts(file, cuts)
    return layout.without(cuts)


def read_added(file: BinaryIO) -> bytes | None:
    """Return the recording from the end of a file that no other tool saved since, reading only its end.

    None if it is not there: it may then be among the events, under a top-level key, or missing.
    """
    size = file.seek(0, 2)
    first = max(0, size - _TAIL_BYTES)
    file.seek(first)
    tail = file.read()
    for match in reversed(list(_SPLICED_END.finditer(tail))):
        end = first + match.end(1)
        found = _find_addition(file, end)
        if found is None or found[0] != int(match[2]):
            continue
        if JsonCursor(io.BytesIO().read, file.name, tail[match.end() :]).is_rest_of_object():
            return _recording_in(file, found[1], end)
    return None


class _Payload(msgspec.Struct):
    schema_version: int
    ranks: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _own_cuts(file: BinaryIO, layout: TraceLayout) -> Iterator[Cut]:
    end = layout.events.end
    addition = _find_addition(file, end)
    if addition is not None:
        start, event = addition
        _refuse_several_ranks(file, _payload(_recording_in(file, event, end)))
        yield start, end
        return
    old = _payload(layout.old_value) if layout.old_key is not None else None
    if old is not None and layout.old_key is not None:
        _refuse_several_ranks(file, old)
        yield layout.old_key
    if old is not None or layout.events.holds_lists:  # as the routers of a recording are
        yield from _own_elements(file, layout)


def _recording_in(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    event = file.read(end - start)
    return event[event.index(b'"%b":' % METADATA_KEY.encode()) + len(METADATA_KEY) + 3 : -2]


def _payload(recording: bytes) -> _Payload | None:
    """Return the recording's version and ranks; None for other data, such as user metadata under the key."""
    try:
        return msgspec.json.decode(recording, type=_Payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _refuse_several_ranks(file: BinaryIO, payload: _Payload | None) -> None:
    if payload is not None and payload.ranks is not msgspec.UNSET:
        raise TraceFileError(
            f"{file.name}: found a merged trace of several ranks, expected that of one; merge the "
            "samples into the rank's own trace, then the ranks again"
        )


def _own_elements(file: BinaryIO, layout: TraceLayout) -> Iterator[Cut]:
    """Yield moe_trace's events, with their commas, in a file saved by another tool or an older release."""
    file.seek(layout.events.start - 1)
    stream = JsonStream(file.read, file.name)
    kept_end = run_end = None
    base = layout.events.start - 1
    for offset, text in stream.elements():
        start, end = base + offset, base + offset + len(text)
        if _is_own_event(file, text):
            run_end = end
            continue
        if run_end is not None:
            yield (layout.events.start, start) if kept_end is None else (kept_end, run_end)
        kept_end, run_end = end, None
    if run_end is not None:
        yield layout.events.start if kept_end is None else kept_end, run_end


def _is_own_event(file: BinaryIO, text: bytes) -> bool:
    if not _MAYBE_OWN.search(text):
        return False
    event = value_or_none(text)
    if not isinstance(event, dict):
        return False
    arguments = event.get("args")
    recording = arguments.get(METADATA_KEY) if isinstance(arguments, dict) else None
    if isinstance(recording, dict) and event.get("ph") == "M":
        payload = _payload(json.dumps(recording).encode())
        _refuse_several_ranks(file, payload)
        if payload is not None:
            return True
    return is_band(event.get("pid"))


def _remove_cuts(file: BinaryIO, cuts: Sequence[Cut]) -> None:
    size = file.seek(0, 2)
    target = cuts[0][0]
    bounds = [*cuts, (size, size)]
    for (_, since), (to, _) in itertools.pairwise(bounds):
        while since < to:
            file.seek(since)
            block = file.read(min(_COPY_BYTES, to - since))
            file.seek(target)
            file.write(block)
            since, target = since + len(block), target + len(block)
    file.truncate(target)
