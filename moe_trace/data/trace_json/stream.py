"""The events of a trace in bounded memory: in batches, one by one, or only where they end.

The events are most of the file. They are cut into batches at a guessed boundary (the last `}` that a comma
follows), and the batch is decoded as one JSON array. A guess that falls inside a string or a nested object
leaves quotes or brackets unbalanced, so the decoder itself proves each guess; only where it objects is the
text scanned bracket by bracket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import METADATA_KEY
from moe_trace.data.trace_json.cursor import SPACE, TOKEN, JsonCursor
from moe_trace.data.trace_json.resync import decode_around_breaks, is_json

SKIP_BYTES = 2**20  # searched while it is in the processor's cache
_ERROR_AT = re.compile(r"trailing characters \(byte (\d+)\)")
_REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_GUESSES = 4
_COMMA = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+")
_BRACE_AND_BRACKET = re.compile(rb"\}[ \t\r\n]*+\]")
_FEW = 64
_CARRIER = re.compile(rb'\{[^{}\[\]]*"args"\s*:\s*\{[^{}\[\]]*"%b"\s*:\s*\{' % METADATA_KEY.encode())
_WHITE = b" \t\r\n"
_T = TypeVar("_T")


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


class JsonStream(JsonCursor):
    """A cursor over a trace's JSON that can take its events."""

    def batches(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> Iterator[list[_T]]:
        """The elements of the next value, an array of objects, some at a time.

        Args:
            decode: a JSON array's text -> its elements; raises `msgspec.DecodeError`.
            one: the text of a single element; called for each element of a batch that `decode` refuses.
        """
        self._expect(b"[")
        while True:
            self._fill_block()
            if self._peek() == b"]":
                self._at += 1
                return
            yield self._guessed_batch(decode) or self._resynced_batch(decode, one)
            if self._peek() == b",":
                self._at += 1
            elif self._peek() != b"]":
                raise self._broken("a comma or the end of traceEvents")

    def skip_objects(self) -> ArrayBounds:
        """Pass over the next value, an array of objects, at the speed of a search for its end.

        The keys behind it are read to prove the end, and kept for whoever walks on.

        Raises:
            TraceFileError: no such array stands here, or the file is truncated.
        """
        self._expect(b"[")
        start = self.position
        if self._peek() == b"]":
            self._at += 1
            return ArrayBounds(start, start)
        if self._peek() != b"{":
            raise self._broken("an event")
        holds_lists = False
        while True:
            searched = len(self._data)
            for brace, bracket in _brackets_behind_braces(self._data, self._at):
                if self._ends_at(bracket):
                    end = self._taken - len(self._data) + brace + 1
                    self._at = bracket + 1
                    return ArrayBounds(start, end, holds_lists)
                holds_lists = True
            if self._ended and searched == len(self._data):
                self._at = searched
                raise self._broken("the end of the events and of the object that holds them")
            self._at = max(self._at, _last_mark(self._data, searched))  # its bracket may follow
            self._fill(SKIP_BYTES)

    def _ends_at(self, bracket: int) -> bool:
        """Whether from behind the bracket on the rest of the file is the rest of the object."""
        ahead: list[bytes] = []

        def read(size: int) -> bytes:
            ahead.append(self._read(size))
            return ahead[-1]

        rest = JsonStream(read, self.name)
        rest._data, rest._at, rest._ended = self._data, bracket + 1, self._ended
        try:
            mark = rest._peek()
            rest._at += 1
            if mark == b"}":
                rest._require_end()
            elif mark == b",":
                for _ in rest._members():
                    rest.skip()
            found = mark in (b",", b"}")
        except TraceFileError:
            found = False
        self._data = b"".join([self._data, *ahead])
        self._taken += sum(map(len, ahead))
        self._ended = rest._ended
        return found

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """The elements of the next value, an array of objects, each with its offset."""
        self._expect(b"[")
        while self._peek() != b"]":
            ends = self._element_ends()
            first, at = self._taken - len(self._data), self._at
            for text in self._elements(ends):
                at = self._data.index(text, at)
                yield first + at, text
                at += len(text)
            self._at = ends[-1]
            if self._peek() == b",":
                self._at += 1
            elif self._peek() != b"]":
                raise self._broken("a comma or the end of traceEvents")
        self._at += 1

    # -- batches --------------------------------------------------------------------------------------

    def _guessed_batch(self, decode: Callable[[bytes], list[_T]]) -> list[_T] | None:
        cut = len(self._data)
        for _ in range(_GUESSES):
            cut = self._data.rfind(b"},", self._at, cut) + 1
            if cut <= self._at:
                return None
            text = b"[%b]" % self._data[self._at : cut]
            found: list[_T] | None = None
            try:
                found = decode(text)
            except msgspec.ValidationError:
                return None  # sound JSON perhaps, but not typed as expected
            except _REFUSALS as error:
                found, cut = self._batch_before(text, error, decode, cut)
            if found:
                self._at = cut
                return found
        return None

    def _batch_before(
        self, text: bytes, error: Exception, decode: Callable[[bytes], list[_T]], cut: int
    ) -> tuple[list[_T] | None, int]:
        """Where the array ends inside the text, msgspec names the byte after it: one more guess."""
        position = _ERROR_AT.search(str(error))
        bracket = text.rfind(b"]", 0, int(position.group(1))) if position else -1
        if bracket <= 0:
            return None, cut
        try:
            return decode(text[:bracket] + b"]"), self._at + bracket - 1
        except _REFUSALS:
            return None, cut

    def _resynced_batch(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> list[_T]:
        data, more, taken = self._data, not self._ended, None
        carrier = _CARRIER.search(data, self._at)
        if carrier is not None:  # as long as it may be, and whatever lists it holds, a recording is sound
            data, more = data[: carrier.start()] + b'{"', False
        if carrier is None or carrier.start() > self._at:
            taken = decode_around_breaks(data, self._at, decode, one, more=more)
        if taken is None:
            return self._scanned_batch(decode, one)
        found, self._at = taken
        return found

    def _scanned_batch(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> list[_T]:
        ends = self._element_ends()
        text = self._data[self._at : ends[-1]]
        try:
            found = decode(b"[%b]" % text)
        except _REFUSALS:
            found = []
            for element in self._elements(ends):
                # From an odd quote on strings are inside out: who resynchronises takes over there.
                if found and not is_json(element):
                    break
                found.append(one(element))
        self._at = ends[len(found) - 1]
        return found

    def _elements(self, ends: list[int]) -> Iterator[bytes]:
        start = self._at
        for i, end in enumerate(ends):
            between = _COMMA.match(self._data, start, end) if i else SPACE.match(self._data, start, end)
            if between is None:
                self._at = start
                raise self._broken("a comma")
            yield self._data[between.end() : end]
            start = end

    def _element_ends(self) -> list[int]:
        """Where the objects in the buffer end, up to the end of the array; at least one."""
        ends: list[int] = []
        position, depth = self._at, 0
        while True:
            match = TOKEN.search(self._data, position)
            token = match.group() if match else b'"'
            if token == b'"':  # nothing more in the buffer, or a string that is cut off
                if ends:
                    return ends
                position -= self._at
                self._grow()
                continue
            assert match is not None
            position = match.end()
            if token in b"{[":
                depth += 1
            elif token in b"}]":
                depth -= 1
                if depth < 0:
                    if not ends:
                        raise self._broken("an event")
                    return ends
                if depth == 0:
                    ends.append(position)


def _brackets_behind_braces(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Offsets of each `]` with nothing but white space between it and a `}`, and of that."""
    text = np.frombuffer(data, np.uint8)[start:]
    brackets = np.flatnonzero(text[1:] == ord("]"))  # few bytes are: the rest is asked of them alone
    before = text[brackets]
    hits = brackets[(before == ord("}")) | (before <= ord(" "))] + 1
    if len(hits) > _FEW:  # indented lists of numbers
        yield from ((m.start(), m.end() - 1) for m in _BRACE_AND_BRACKET.finditer(data, start))
        return
    for bracket in (hits + start).tolist():
        brace = _last_mark(data, bracket)
        if brace >= start and data[brace] == ord("}"):
            yield brace, bracket


def _last_mark(data: bytes, end: int) -> int:
    """Offset of the last byte before `end` that is not white space."""
    at = end - 1
    while at >= 0 and data[at] in _WHITE:
        at -= 1
    return at


def loads_lenient(text: bytes) -> Any:
    """One value of JSON that a strict parser refuses: NaN, control characters in strings, broken UTF-8.

    Raises:
        ValueError: it is not JSON even so, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8", "replace"), strict=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
