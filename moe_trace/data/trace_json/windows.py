"""Search the events in a trace's file block by block, in one buffer of a fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

CHUNK = 2**20  # read and searched while it is in the processor's cache
EVENT_MAX = 64 * 2**10
"""Bytes of one event, on each side of what is found in it; ours are below 1 KiB."""


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
