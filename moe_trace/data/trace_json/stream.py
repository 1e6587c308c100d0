"""The events of a trace in bounded memory: in batches, one by one, or only where they end.

The events are most of the file. They are cut into batches at a guessed boundary (the last `}` that a comma
follows), and the batch is decoded as one JSON array. A guess that falls inside a string or a nested object
leaves quotes or brackets unbalanced, so the decoder itself proves each guess; only where it objects is the
text scanned bracket by bracket.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import msgspec

from moe_trace.data.schema import METADATA_KEY
from moe_trace.data.trace_json.array_end import ArrayBounds, find_end
from moe_trace.data.trace_json.cursor import SPACE, TOKEN, JsonCursor
from moe_trace.data.trace_json.resync import decode_around_breaks, is_json
from moe_trace.data.trace_json.windows import EventBytes, Window

_ERROR_AT = re.compile(r"trailing characters \(byte (\d+)\)")
_REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_GUESSES = 4
_COMMA = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+")
_CARRIER = re.compile(rb'\{[^{}\[\]]*"args"\s*:\s*\{[^{}\[\]]*"%b"\s*:\s*\{' % METADATA_KEY.encode())
_T = TypeVar("_T")


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

    def skip_objects(self, file: BinaryIO, watch: Callable[[Window], None]) -> ArrayBounds:
        """Pass over the next value, an array of objects, at the speed of a search for its end.

        Args:
            file: what the cursor reads, from its first byte on.
            watch: is shown the array on the way.

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
        size = file.seek(0, io.SEEK_END)
        found = find_end(EventBytes(file, start, size), watch)
        self._continue_at(file, found[1] + 1 if found else size)
        if found is None:
            raise self._broken("the end of the events and of the object that holds them")
        return found[0]

    def _continue_at(self, file: BinaryIO, offset: int) -> None:
        file.seek(offset)
        self._data, self._at, self._taken, self._ended = b"", 0, offset, False

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


def decoders(kind: type[_T]) -> tuple[Callable[[bytes], list[_T]], Callable[[bytes], _T]]:
    """What `JsonStream.batches` asks for, for structs that have a default for each field.

    An event that the fast way refuses is read without its raw fields; one that cannot be understood has the
    defaults alone.
    """
    names = [field.name for field in msgspec.structs.fields(kind) if field.type is not msgspec.Raw]  # type: ignore[arg-type]

    def one(text: bytes) -> _T:
        try:
            value = loads_lenient(text)
            return msgspec.convert({name: value[name] for name in names if name in value}, kind)
        except (ValueError, TypeError, OverflowError):
            return kind()

    return msgspec.json.Decoder(list[kind]).decode, one  # type: ignore[valid-type]


def events_as(kind: type[_T], events: EventBytes) -> Iterator[_T]:
    """The events, as `decoders` reads them."""
    events.file.seek(events.start - 1)
    for batch in JsonStream(events.file.read, events.file.name).batches(*decoders(kind)):
        yield from batch


def loads_lenient(text: bytes) -> Any:
    """One value of JSON that a strict parser refuses: NaN, control characters in strings, broken UTF-8.

    Raises:
        ValueError: it is not JSON even so, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8", "replace"), strict=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def value_or_none(text: bytes) -> Any:
    """The same, None for what is no JSON."""
    try:
        return loads_lenient(text)
    except ValueError:
        return None
