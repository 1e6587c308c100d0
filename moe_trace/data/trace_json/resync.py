"""Recovery after an event that is not valid JSON: torch writes quotes in range names unescaped.

An event ends at `}`, a comma and the `{"` of the next, which no JSON string contains unescaped. Runs of such
pieces are decoded together, in ever shorter runs around a failure, until the broken event is isolated: it is
passed to the caller's lenient decoder, which counts it, and reading continues with the next one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Generic, Literal, TypeVar

import msgspec

BOUNDARY = re.compile(rb'\}[ \t\r\n]*+,[ \t\r\n]*+(?=\{[ \t\r\n]*+["}])')
_END_BEFORE_KEY = rb"""\}[ \t\r\n]*+\](?=[ \t\r\n]*+,[ \t\r\n]*+"(?:[^"\\]|\\.){0,256}+"[ \t\r\n]*+:)"""
_END_OF_OBJECT = rb"\}[ \t\r\n]*+\](?=[ \t\r\n]*+\}[ \t\r\n]*+\Z)"
_END = re.compile(_END_BEFORE_KEY, re.DOTALL)
_END_OF_FILE = re.compile(_END_BEFORE_KEY + b"|" + _END_OF_OBJECT, re.DOTALL)
"""End of the array: a bracket after its last element, then the next key or the end of its object."""
REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NESTED_MAX = 256
"""Maximum number of pieces into which lists of objects in its arguments can split one event."""
_EVENT_MAX = 2**20
_MAX_REREAD_BYTES = 2**23
"""Bytes of events split by lists that may be re-read in one buffer of malformed input."""
_T = TypeVar("_T")


def decode_around_breaks(
    data: bytes,
    start: int,
    decode: Callable[[bytes], list[_T]],
    one: Callable[[bytes], _T],
    *,
    more: bool = False,
) -> tuple[list[_T], int] | None:
    """Decode the elements of an array of objects from an offset to the end of the buffer.

    Args:
        decode: a JSON array's text -> its elements; raises `msgspec.DecodeError`.
        one: the text of an element that `decode` rejects.
        more: whether the file continues after the buffer.

    Returns:
        The elements and the offset just after the last of them; None if none ends in the buffer.
    """
    return _Pieces(data, start, decode, one, more).take()


class _Pieces(Generic[_T]):
    def __init__(
        self,
        data: bytes,
        start: int,
        decode: Callable[[bytes], list[_T]],
        one: Callable[[bytes], _T],
        more: bool,
    ) -> None:
        self._data, self._decode, self._decode_one, self._has_more = data, decode, one, more
        self._starts, self._ends = [start], list[int]()
        for boundary in BOUNDARY.finditer(data, start):
            self._ends.append(boundary.start() + 1)
            self._starts.append(boundary.end())
        self._found: list[_T] = []
        self._reread_bytes = _MAX_REREAD_BYTES
        self._position = start

    def take(self) -> tuple[list[_T], int] | None:
        first, count = 0, len(self._ends)
        if not count:
            return (
                (self._found, self._position) if self._take_last(self._starts[0], len(self._data)) else None
            )
        size = count
        while first < count:
            size = min(size, count - first)
            if self._take_run(first, first + size):
                first, size = first + size, 2 * size
            elif size > 1:
                size //= 2
            elif (following := self._take_one(first)) is None:
                break
            else:
                first = following
        return (self._found, self._position) if self._found else None

    def _take_run(self, first: int, last: int) -> bool:
        """Decode pieces together; return whether that succeeded."""
        try:
            self._found += self._decode(b"[%b]" % self._data[self._starts[first] : self._ends[last - 1]])
        except REFUSALS:
            return False
        self._position = self._ends[last - 1]
        return True

    def _take_last(self, start: int, end: int, *, broken: bool = True) -> bool:
        """Take the last element, `broken` or not, if the array ends in this piece; return whether it does."""
        if _state(self._data[start:end]) == "whole":
            return False
        pattern = _END if self._has_more else _END_OF_FILE
        found = itertools.takewhile(lambda m: m.start() < end, pattern.finditer(self._data, start))
        ends = [bracket.start() + 1 for bracket in found]
        for stop in ends:
            text = self._data[start:stop]
            try:
                self._found += self._decode(b"[%b]" % text)
            except REFUSALS:
                if _state(text) != "whole":
                    continue
                self._found.append(self._decode_one(text))
            self._position = stop
            return True
        # A bracket after text that is valid so far closes a list inside the element, not the array.
        ends = [stop for stop in ends if _state(self._data[start:stop]) != "open"] if broken else []
        if ends:
            self._found.append(self._decode_one(self._data[start : ends[0]]))
            self._position = ends[0]
        return bool(ends)

    def _take_one(self, first: int) -> int | None:
        """Take one event, which lists in it may have split; return the next piece, or None at the end."""
        start = self._starts[first]
        for last in range(first + 1, min(first + _NESTED_MAX, len(self._ends)) + 1):
            if self._take_run(first, last):
                return last
            text = self._data[start : self._ends[last - 1]]
            self._reread_bytes -= len(text)
            state = _state(text)
            if self._reread_bytes < 0 or state in ("whole", "broken"):
                if state == "whole":  # valid JSON, but of an unexpected type
                    return self._take_broken(text, last)
                if self._take_last(start, self._ends[last - 1]):
                    return None
                break
        else:
            if self._has_more and len(self._data) - start < _EVENT_MAX:
                return None  # its end may be in the next buffer
            if not self._has_more and self._take_last(start, len(self._data), broken=False):
                return None
        if self._take_last(start, self._ends[first]):
            return None
        return self._take_broken(self._data[start : self._ends[first]], first + 1)

    def _take_broken(self, text: bytes, following: int) -> int:
        """Take an event that only the lenient decoder may understand."""
        self._found.append(self._decode_one(text))
        self._position = self._ends[following - 1]
        return following


def _state(text: bytes) -> Literal["whole", "open", "in a string", "broken"]:
    """Classify text as a lenient parser would: `open` if it ends inside a list or an object."""
    decoded = text.decode("utf-8", "replace")
    try:
        json.loads(decoded, strict=False)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            return "in a string"
        return "open" if error.pos >= len(decoded) else "broken"
    except RecursionError:
        return "broken"
    return "whole"
