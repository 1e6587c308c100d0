"""The events of a trace in bounded memory: in batches, one by one, or only where they end.

The events are most of the file. They are cut into batches at a guessed boundary, where one object in a list
seems to end and the next to begin, and the batch is decoded as one JSON array. A guess that falls inside an
event leaves brackets unbalanced, so the decoder itself proves each guess; only where it objects is the text
looked at piece by piece.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import msgspec

from moe_trace.data.schema import METADATA_KEY
from moe_trace.data.trace_json.cursor import JsonCursor
from moe_trace.data.trace_json.resync import BOUNDARY, REFUSALS, decode_around_breaks
from moe_trace.data.trace_json.windows import ArrayBounds, EventBytes, Window, find_end

_CARRIER = re.compile(rb'\{[^{}\[\]]*"args"\s*:\s*\{[^{}\[\]]*"%b"\s*:\s*\{' % METADATA_KEY.encode())
_T = TypeVar("_T")
_decode_texts = msgspec.json.Decoder(list[msgspec.Raw]).decode


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
            self._fill()
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
        for batch in self.batches(_decode_texts, msgspec.Raw):
            first, at, found = self._taken - len(self._data), self._at, []
            for text in map(bytes, reversed(batch)):  # between two of them stand a comma and white space
                at = self._data.rindex(text[-1:], 0, at) + 1 - len(text)
                found.append((first + at, text))
            yield from reversed(found)

    # -- batches --------------------------------------------------------------------------------------

    def _guessed_batch(self, decode: Callable[[bytes], list[_T]]) -> list[_T] | None:
        """All before the last place in the buffer where one object in a list ends and the next begins."""
        cut = self._data.rfind(b"},", self._at)
        while cut >= 0 and not BOUNDARY.match(self._data, cut):
            cut = self._data.rfind(b"},", self._at, cut)
        if cut < 0:
            return None
        try:
            found = decode(b"[%b]" % self._data[self._at : cut + 1])
        except REFUSALS:
            return None
        self._at = cut + 1
        return found

    def _resynced_batch(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> list[_T]:
        data, more, taken = self._data, not self._ended, None
        carrier = _CARRIER.search(data, self._at)
        if carrier is not None:  # as long as it may be, and whatever lists it holds, a recording is sound
            data, more = data[: carrier.start()] + b'{"', False
        if carrier is None or carrier.start() > self._at:
            taken = decode_around_breaks(data, self._at, decode, one, more=more)
        if taken is None:
            return self._one_element(decode, one)
        found, self._at = taken
        return found

    def _one_element(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> list[_T]:
        """The next, however long it is."""
        end = self._value_end(self._grow)
        if self._peek() != b"{":
            raise self._broken("an event")
        text = self._taken_to(end)
        try:
            return decode(b"[%b]" % text)
        except REFUSALS:
            return [one(text)]


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
