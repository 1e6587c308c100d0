"""Streaming of a trace's events in bounded memory: in batches, one by one, or only up to their end.

The events are most of the file. They are cut into batches at a guessed boundary, where one object in a list
seems to end and the next to begin, and each batch is decoded as one JSON array. A guess inside an event
leaves brackets unbalanced, so the decoder itself verifies each guess; only where it fails is the text
examined piece by piece.
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
_LIST_OF_OBJECTS = re.compile(rb"\[[ \t\r\n]*+\{")
_T = TypeVar("_T")
_decode_texts = msgspec.json.Decoder(list[msgspec.Raw]).decode


class JsonStream(JsonCursor):
    """A cursor over a trace's JSON that can also read its events."""

    def batches(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> Iterator[list[_T]]:
        """Yield the elements of the next value, an array of objects, in batches.

        Args:
            decode: a JSON array's text -> its elements; raises `msgspec.DecodeError`.
            one: the text of a single element; called for each element of a batch that `decode` rejects.
        """
        self._expect(b"[")
        while True:
            self._fill()
            if self._peek() == b"]":
                self._index += 1
                return
            yield (
                self._guessed_batch(decode) or self._around_lists(decode) or self._resynced_batch(decode, one)
            )
            if self._peek() == b",":
                self._index += 1
            elif self._peek() != b"]":
                raise self._broken("a comma or the end of traceEvents")

    def skip_objects(self, file: BinaryIO, watch: Callable[[Window], None]) -> ArrayBounds:
        """Skip the next value, an array of objects, by searching for its end.

        Args:
            file: the file that the cursor reads, from its first byte.
            watch: called with each window of the array.

        Raises:
            TraceFileError: there is no such array here, or the file is truncated.
        """
        self._expect(b"[")
        start = self.position
        if self._peek() == b"]":
            self._index += 1
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
        self._data, self._index, self._bytes_read, self._ended = b"", 0, offset, False

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """Yield the elements of the next value, an array of objects, each with its offset."""
        for batch in self.batches(_decode_texts, msgspec.Raw):
            first, at, found = self._bytes_read - len(self._data), self._index, []
            for text in map(bytes, reversed(batch)):  # separated by a comma and white space
                at = self._data.rindex(text[-1:], 0, at) + 1 - len(text)
                found.append((first + at, text))
            yield from reversed(found)

    # -- batches --------------------------------------------------------------------------------------

    def _guessed_batch(self, decode: Callable[[bytes], list[_T]]) -> list[_T] | None:
        """Decode up to the last place in the buffer where one object seems to end and the next to begin."""
        end = self._last_boundary(len(self._data))
        if end is None:
            return None
        try:
            found = decode(b"[%b]" % self._data[self._index : end])
        except REFUSALS:
            return None
        self._index = end
        return found

    def _last_boundary(self, before: int) -> int | None:
        cut = self._data.rfind(b"},", self._index, before)
        while cut >= 0 and not BOUNDARY.match(self._data, cut):
            cut = self._data.rfind(b"},", self._index, cut)
        return None if cut < 0 else cut + 1

    def _around_lists(self, decode: Callable[[bytes], list[_T]]) -> list[_T]:
        """Decode valid elements whose lists of objects mislead the guess: those singly, others in runs."""
        found: list[_T] = []
        after_last = self._index
        while (nested := _LIST_OF_OBJECTS.search(self._data, after_last)) is not None:
            end = self._last_boundary(nested.start()) or self._end_in_buffer()
            if end is None:
                break
            text, mark = self._data[self._index : end], self._skip_space(end)
            if not text.lstrip().startswith(b"{") or self._data[mark : mark + 1] not in (b",", b"]"):
                break
            try:
                found += decode(b"[%b]" % text)
            except REFUSALS:
                break
            self._index, after_last = mark + 1, end
            if self._data[mark : mark + 1] == b"]" or self._skip_space(self._index) == len(self._data):
                break
        self._index = after_last
        return found

    def _resynced_batch(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> list[_T]:
        data, more, taken = self._data, not self._ended, None
        carrier = _CARRIER.search(data, self._index)
        if carrier is not None:  # the recording is valid, however long and nested
            data, more = data[: carrier.start()] + b'{"', False
        if carrier is None or carrier.start() > self._index:
            taken = decode_around_breaks(data, self._index, decode, one, more=more)
        if taken is None:
            return self._one_element(decode, one)
        found, self._index = taken
        return found

    def _one_element(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> list[_T]:
        end = self._value_end(self._grow)
        if self._peek() != b"{":
            raise self._broken("an event")
        text = self._take_until(end)
        try:
            return decode(b"[%b]" % text)
        except REFUSALS:
            return [one(text)]


def decoders(kind: type[_T]) -> tuple[Callable[[bytes], list[_T]], Callable[[bytes], _T]]:
    """Return the arguments of `JsonStream.batches` for structs with a default for each field.

    An event that the fast path rejects is read without its raw fields; an invalid one has only defaults.
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
    """Yield the events, decoded by `decoders`."""
    events.file.seek(events.start - 1)
    for batch in JsonStream(events.file.read, events.file.name).batches(*decoders(kind)):
        yield from batch


def loads_lenient(text: bytes) -> Any:
    """Parse one JSON value that a strict parser rejects: NaN, control characters in strings, broken UTF-8.

    Raises:
        ValueError: it is still not JSON, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8", "replace"), strict=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def value_or_none(text: bytes) -> Any:
    """Like `loads_lenient`, but None for text that is not JSON."""
    try:
        return loads_lenient(text)
    except ValueError:
        return None
