"""Search for events, and for their end, in a trace file block by block through one buffer of fixed size.

An array of objects ends at the first bracket after a brace from which the rest of the file is the rest of the
enclosing object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from moe_trace.data.trace_json.cursor import JsonCursor

CHUNK = 2**20  # small enough to be searched while in the CPU cache
EVENT_MAX = 64 * 2**10
"""Maximum bytes of an event on each side of a match in it; moe_trace's own are below 1 KiB."""
_WHITESPACE = b" \t\r\n"
_PEEK_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a file with its surroundings; requesting the next window overwrites the buffer."""

    buffer: bytearray
    offset: int
    """Offset in the file of the buffer's first byte."""
    since: int
    until: int
    """Matches that begin in `[since, until)` are in no other window."""
    filled: int
    """Number of bytes in the buffer that contain file data."""

    def ending_at(self, end: int) -> Window:
        """Return the window as if the events ended at `end`."""
        return replace(self, until=min(self.until, end), filled=end)


@dataclass(frozen=True, eq=False)
class EventBytes:
    """The part of a trace file that contains its events."""

    file: BinaryIO
    start: int
    end: int

    def windows(self) -> Iterator[Window]:
        """Yield windows over all of it, in order; the caller may move the file position."""
        # Keep from the previous block the text before a match, and matches whose event is cut off.
        buffer = bytearray(2 * EVENT_MAX + CHUNK)
        view = memoryview(buffer)
        filled = searched = 0
        position = self.start
        while position < self.end:
            self.file.seek(position)
            size = min(CHUNK, self.end - position)
            read = self.file.readinto(view[filled : filled + size])  # type: ignore[attr-defined]
            if not read:
                return
            filled, position = filled + read, position + read
            limit = max(searched, filled - EVENT_MAX) if position < self.end else filled
            yield Window(buffer, position - filled, searched, limit, filled)
            kept_from = max(0, limit - EVENT_MAX)
            view[: filled - kept_from] = bytes(view[kept_from:filled])
            filled, searched = filled - kept_from, limit - kept_from


@dataclass(frozen=True)
class ArrayBounds:
    """Bounds of an array of objects, as offsets in the JSON."""

    start: int
    """Just after its opening bracket."""
    end: int
    """Just after its last element; `start` where it is empty."""
    holds_lists: bool = False
    """Whether an object in it contains a list that ends with an object."""

    @property
    def empty(self) -> bool:
        """Whether it has no elements."""
        return self.end == self.start


def find_end(rest: EventBytes, watch: Callable[[Window], None]) -> tuple[ArrayBounds, int] | None:
    """Return the bounds of the array and the offset of its closing bracket; None if the file does not end it.

    Args:
        rest: the file from the array's first element on.
        watch: called with each window of the elements.
    """
    holds_lists, brace_before = False, None
    for window in rest.windows():
        for bracket in _brackets(window):
            mark = _last_mark(window.buffer, bracket)
            brace = brace_before if mark < 0 else _brace(window, mark)
            if brace is None:
                continue
            if _ends_at(rest, window, bracket):
                watch(window.ending_at(bracket))
                return ArrayBounds(rest.start, brace + 1, holds_lists), window.offset + bracket
            holds_lists = True
        watch(window)
        mark = _last_mark(window.buffer, window.until)
        brace_before = brace_before if mark < 0 else _brace(window, mark)
    return None


def _brackets(window: Window) -> Iterator[int]:
    """Yield the positions of `]` after a `}` or white space."""
    text = np.frombuffer(window.buffer, np.uint8)
    brackets = np.flatnonzero(text[window.since : window.until] == ord("]")) + window.since
    before = text[brackets - 1]  # test only the brackets, which are few
    yield from brackets[(before == ord("}")) | (before <= ord(" "))].tolist()


def _last_mark(buffer: bytearray, end: int) -> int:
    """Return the position of the last byte before `end` that is not white space; -1 if there is none."""
    for size in (64, end):
        start = max(0, end - size)
        kept = buffer[start:end].rstrip(_WHITESPACE)
        if kept:
            return start + len(kept) - 1
    return -1


def _brace(window: Window, at: int) -> int | None:
    """Return the file offset of the position if it holds a closing brace."""
    return window.offset + at if window.buffer[at] == ord("}") else None


def _ends_at(rest: EventBytes, window: Window, bracket: int) -> bool:
    peeked = bytes(window.buffer[bracket + 1 : min(window.filled, bracket + 1 + _PEEK_BYTES)])
    rest.file.seek(window.offset + bracket + 1 + len(peeked))
    return JsonCursor(rest.file.read, str(rest.file.name), peeked).is_rest_of_object()
