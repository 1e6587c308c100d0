"""Walk through a trace's JSON in bounded memory: the values beside `traceEvents`, and the events in batches.

The events are most of the file. They are cut into batches at a guessed boundary (the last `}` that a comma
follows), and the batch is decoded as one JSON array. A guess that falls inside a string or a nested object
leaves quotes or brackets unbalanced, so the decoder itself proves each guess; only where it objects is the
text scanned bracket by bracket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from moe_trace.data.errors import TraceFileError
from moe_trace.data.resync import decode_around_breaks

BLOCK_BYTES = 4 * 2**20
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\]]', re.DOTALL)
_ERROR_AT = re.compile(r"trailing characters \(byte (\d+)\)")
_REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_GUESSES = 4
_COMMA = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+")
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^,}\]\s]*+")
_T = TypeVar("_T")


class JsonStream:
    """A cursor over one JSON object that is too large to hold.

    Args:
        read: returns up to that many bytes, none at the end.
        name: of the file, for messages.
    """

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self.name = name
        self._read = read
        self._data = b""
        self._at = 0
        self._ended = False

    # -- the object's own keys ------------------------------------------------------------------------

    def walk(self) -> Iterator[str]:
        """The top-level keys; after each, the caller takes its value by one of the methods below."""
        first = self._peek()
        if not first:
            raise TraceFileError(f"{self.name}: found an empty file; export the trace again")
        if first != b"{":
            raise TraceFileError(self._foreign())
        self._at += 1
        while (mark := self._peek()) != b"}":
            if mark == b",":
                self._at += 1
            key = self._key()
            self._expect(b":")
            yield key
            if self._peek() not in (b",", b"}"):
                raise self._broken("a comma or the end of the object")
        self._at += 1
        if self._peek():
            raise self._broken("the end of the file")

    def value(self) -> bytes:
        """The next value's JSON text."""
        return self._take_value(keep=True)

    def skip(self) -> None:
        """Pass over the next value."""
        self._take_value(keep=False)

    def batches(self, decode: Callable[[bytes], list[_T]], one: Callable[[bytes], _T]) -> Iterator[list[_T]]:
        """The elements of the next value, an array of objects, some at a time.

        Args:
            decode: a JSON array's text -> its elements; raises `msgspec.DecodeError`.
            one: the text of a single element; called for each element of a batch that `decode` refuses.
        """
        self._expect(b"[")
        while True:
            self._fill(BLOCK_BYTES)
            if self._peek() == b"]":
                self._at += 1
                return
            yield self._guessed_batch(decode) or self._resynced_batch(decode, one)
            if self._peek() == b",":
                self._at += 1
            elif self._peek() != b"]":
                raise self._broken("a comma or the end of traceEvents")

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
        taken = decode_around_breaks(self._data, self._at, decode, one, more=not self._ended)
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
            found = [one(element) for element in self._elements(ends)]
        self._at = ends[-1]
        return found

    def _elements(self, ends: list[int]) -> Iterator[bytes]:
        start = self._at
        for i, end in enumerate(ends):
            between = _COMMA.match(self._data, start, end) if i else _SPACE.match(self._data, start, end)
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
            match = _TOKEN.search(self._data, position)
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

    # -- values and keys ------------------------------------------------------------------------------

    def _take_value(self, *, keep: bool) -> bytes:
        if self._peek() not in (b"{", b"[", b'"'):
            return self._scalar()
        parts, depth, position = [], 0, self._at
        while True:
            match = _TOKEN.search(self._data, position)
            token = match.group() if match else b""
            if token in (b"", b'"'):
                seen = match.start() if match else len(self._data)
                if keep:
                    parts.append(self._data[self._at : seen])
                self._at = seen
                self._grow()
                position = self._at
                continue
            assert match is not None
            position = match.end()
            depth += (token in b"{[") - (token in b"}]") if len(token) == 1 else 0
            if depth <= 0:
                if keep:
                    parts.append(self._data[self._at : position])
                self._at = position
                return b"".join(parts)

    def _scalar(self) -> bytes:
        while True:
            match = _SCALAR.match(self._data, self._at)
            assert match is not None
            if match.end() < len(self._data):
                break
            self._grow()  # something must follow, if only the closing brace
        if not match.group():
            raise self._broken("a value")
        self._at = match.end()
        return match.group()

    def _key(self) -> str:
        if self._peek() != b'"':
            raise self._broken("a key")
        try:
            return str(json.loads(self._take_value(keep=True)))
        except ValueError as error:
            raise self._broken("a key") from error

    def _expect(self, mark: bytes) -> None:
        if self._peek() != mark:
            raise self._broken(repr(mark.decode()))
        self._at += 1

    # -- the buffer -----------------------------------------------------------------------------------

    def _peek(self) -> bytes:
        """The next byte that is not white space, where the cursor then stands; b"" at the end."""
        while True:
            match = _SPACE.match(self._data, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._data):
                return self._data[self._at : self._at + 1]
            if self._ended:
                return b""
            self._fill(BLOCK_BYTES)

    def _fill(self, size: int) -> None:
        """Have at least `size` bytes from the cursor on, if the file has them."""
        parts = [self._data[self._at :]]
        have = len(parts[0])
        while have < size and not self._ended:
            block = self._read(size - have)
            self._ended = not block
            parts.append(block)
            have += len(block)
        if len(parts) > 1:
            self._data, self._at = b"".join(parts), 0

    def _grow(self) -> None:
        """More of one value; doubling keeps the work linear."""
        if self._ended:
            raise TraceFileError(
                f"{self.name}: the JSON ends too early, in {self._excerpt(len(self._data) - 40)!r}; "
                "the file is truncated - export it again"
            )
        self._fill(max(BLOCK_BYTES, 2 * (len(self._data) - self._at)))

    def _excerpt(self, start: int) -> str:
        return self._data[max(0, start) : max(0, start) + 40].decode("utf-8", "replace").strip()

    def _broken(self, expected: str) -> TraceFileError:
        if not self._peek():
            return TraceFileError(
                f"{self.name}: the JSON ends too early, expected {expected}; the file is truncated - "
                "export it again"
            )
        return TraceFileError(
            f"{self.name}: expected {expected}, found {self._excerpt(self._at)!r}; the file is not JSON as "
            "torch.profiler writes it - export it again"
        )

    def _foreign(self) -> str:
        return (
            f"{self.name}: expected the Chrome trace JSON of torch.profiler, an object with `traceEvents`, "
            f"found {self._excerpt(self._at)!r}; give the .json or .json.gz file that "
            "prof.export_chrome_trace wrote"
        )


def loads_lenient(text: bytes) -> Any:
    """One value of JSON that a strict parser refuses: NaN, control characters in strings, broken UTF-8.

    Raises:
        ValueError: it is not JSON even so, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8", "replace"), strict=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
