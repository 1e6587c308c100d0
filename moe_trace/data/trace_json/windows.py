"""Search the events in a trace's file block by block, in one buffer of a fixed size, and for their end.

An array of objects ends at the first bracket behind a brace from which on the rest of the file is the rest of
the object that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from moe_trace.data.trace_json.cursor import JsonCursor

CHUNK = 2**20  # read and searched while it is in the processor's cache
EVENT_MAX = 64 * 2**10
"""Bytes of one event, on each side of what is found in it; ours are below 1 KiB."""
_WHITE = b" \t\r\n"
_HELD = 4096


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a file with what stands round it; the buffer is overwritten once the next is asked for."""

    buffer: bytearray
    offset: int
    """Of the buffer's first byte in the file."""
    since: int
    until: int
    """What begins in `[since, until)` is in no other window."""
    filled: int
    """Bytes of the buffer that hold any of the file."""

    def ending_at(self, end: int) -> Window:
        """As it were if the events ended there."""
        return replace(self, until=min(self.until, end), filled=end)


@dataclass(frozen=True, eq=False)
class EventBytes:
    """The part of a trace's file that holds its events."""

    file: BinaryIO
    start: int
    end: int

    def windows(self) -> Iterator[Window]:
        """All of it, in order; whoever asks may move the file."""
        # What is kept of the block before: what stands before a match, and a match whose event is cut off.
        buffer = bytearray(2 * EVENT_MAX + CHUNK)
        view = memoryview(buffer)
        filled = searched = 0
        position = self.start
        while position < self.end:
            self.file.seek(position)
            room = min(CHUNK, self.end - position)
            read = self.file.readinto(view[filled : filled + room])  # type: ignore[attr-defined]
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
    """Where an array of objects stands, as offsets in the JSON."""

    start: int
    """Just after its opening bracket."""
    end: int
    """Just after its last element; `start` where it is empty."""
    holds_lists: bool = False
    """Whether some object in it holds a list that ends with an object."""

    @property
    def empty(self) -> bool:
        """Whether it has no element."""
        return self.end == self.start


def find_end(rest: EventBytes, watch: Callable[[Window], None]) -> tuple[ArrayBounds, int] | None:
    """The bounds of the array, and the offset of its closing bracket; None where the file does not end it.

    Args:
        rest: the file from the array's first element on.
        watch: is shown all elements, window by window.
    """
    holds_lists, brace_before = False, None
    for window in rest.windows():
        for bracket in _brackets(window):
            at = _last_mark(window.buffer, bracket)
            brace = brace_before if at < 0 else _brace(window, at)
            if brace is None:
                continue
            if _ends_at(rest, window, bracket):
                watch(window.ending_at(bracket))
                return ArrayBounds(rest.start, brace + 1, holds_lists), window.offset + bracket
            holds_lists = True
        watch(window)
        at = _last_mark(window.buffer, window.until)
        brace_before = brace_before if at < 0 else _brace(window, at)
    return None


def _brackets(window: Window) -> Iterator[int]:
    """Where there is a `]` with a `}` or white space before it."""
    text = np.frombuffer(window.buffer, np.uint8)
    brackets = np.flatnonzero(text[window.since : window.until] == ord("]")) + window.since
    before = text[brackets - 1]  # few bytes are brackets: the rest is asked of them alone
    yield from brackets[(before == ord("}")) | (before <= ord(" "))].tolist()


def _last_mark(buffer: bytearray, end: int) -> int:
    """Where the last byte before `end` stands that is not white space; -1 where there is none."""
    for size in (64, end):
        start = max(0, end - size)
        kept = buffer[start:end].rstrip(_WHITE)
        if kept:
            return start + len(kept) - 1
    return -1


def _brace(window: Window, at: int) -> int | None:
    """The offset in the file of a closing brace that stands there."""
    return window.offset + at if window.buffer[at] == ord("}") else None


def _ends_at(rest: EventBytes, window: Window, bracket: int) -> bool:
    """Whether from behind the bracket on the rest of the file is the rest of the object."""
    held = bytes(window.buffer[bracket + 1 : min(window.filled, bracket + 1 + _HELD)])
    rest.file.seek(window.offset + bracket + 1 + len(held))
    return JsonCursor(rest.file.read, str(rest.file.name), held).is_rest_of_object()
