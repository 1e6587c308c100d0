"""Cursor over a JSON object too large to hold in memory: its keys, and their values one after another.

Kineto writes each key on its own line and turns every backslash into a slash, so that a quote in the user's
metadata ends its string too early and the file is not valid JSON. Before the events, a value that does not
end where a value can is therefore assumed to extend to the end of its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from moe_trace.data.errors import TraceFileError

BLOCK_BYTES = 4 * 2**20
HELD_BYTES = 16 * 2**20
"""Maximum size of a value before the events that is read a second time."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\]]', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^,}\]\s]*+")
_LINE = re.compile(rb'([^\n]*[^\s,])[ \t]*,[ \t\r]*\n\s*"')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _NoValue(Exception):
    """The text in place of a value is not JSON."""


class JsonCursor:
    """A cursor over one JSON object.

    Args:
        read: returns up to the given number of bytes, none at the end.
        name: name of the file, for messages.
        held: bytes already read, which come first.
    """

    def __init__(self, read: Callable[[int], bytes], name: str, held: bytes = b"") -> None:
        self.name = name
        self._read = read
        self._data = held
        self._index = 0
        self._bytes_read = len(held)
        self._ended = False
        self._before_events = False

    @property
    def position(self) -> int:
        """Offset of the cursor in the bytes read."""
        return self._bytes_read - len(self._data) + self._index

    def walk(self) -> Iterator[str]:
        """Yield the top-level keys; after each, the caller consumes its value with a method below."""
        self._fill()
        if self._data.startswith(_BYTE_ORDER_MARK):
            self._index += len(_BYTE_ORDER_MARK)
        first = self._peek()
        if not first:
            raise TraceFileError(f"{self.name}: found an empty file; export the trace again")
        if first != b"{":
            raise TraceFileError(self._foreign_format())
        self._index += 1
        if self._peek() == b"}":
            self._index += 1
            self._require_end()
            return
        self._before_events = True
        for key in self._members():
            if key == "traceEvents" and not self._before_events:
                raise TraceFileError(f"{self.name}: found `traceEvents` twice; export the trace again")
            self._before_events &= key != "traceEvents"
            yield key

    def _members(self) -> Iterator[str]:
        """Yield keys from the next one to the end of the object and of the file."""
        while True:
            key = self._key()
            self._expect(b":")
            yield key
            if self._ends_behind_value():
                return

    def _ends_behind_value(self) -> bool:
        """Return whether the object ends here, and the file with it; else another key follows."""
        mark = self._peek()
        if mark not in (b",", b"}"):
            raise self._broken("a comma or the end of the object")
        self._index += 1
        if mark == b"}":
            self._require_end()
        return mark == b"}"

    def is_rest_of_object(self) -> bool:
        """Return whether the rest of the file is the rest of an object after a value; reads to its end."""
        try:
            if not self._ends_behind_value():
                for _ in self._members():
                    self.skip()
        except TraceFileError:
            return False
        return True

    def _require_end(self) -> None:
        if self._peek():
            raise self._broken("the end of the file")

    def value(self) -> bytes:
        """Return the next value's JSON text, or its text as a JSON string where it is not JSON."""
        if self._before_events:
            try:
                return self._take_until(self._end_before_mark())
            except _NoValue:
                line = _LINE.match(self._data, self._index)
            if line is not None:
                self._index = line.end(1)
                return json.dumps(line.group(1).decode("utf-8", "replace")).encode()
        return self._take_until(self._value_end(self._grow))  # raises if it is malformed

    def skip(self) -> None:
        """Skip the next value, which is not buffered as a whole if it comes after the events."""
        if self._before_events:
            self.value()
        else:
            self._take_until(self._value_end(self._grow, keep=False))

    # -- values and keys ------------------------------------------------------------------------------

    def _take_until(self, end: int) -> bytes:
        text = self._data[self._index : end]
        if not text:
            raise self._broken("a value")
        self._index = end
        return text

    def _value_end(self, more: Callable[[], None], *, of_line: bool = False, keep: bool = True) -> int:
        """Return the end of the value at the cursor in the buffer, which then contains all of it.

        Args:
            more: extends the buffer with more of the file, or raises.
            of_line: raise `_NoValue` if a string spans from one line's last quote to the first of the next.
            keep: whether the buffer must contain the whole value; else the cursor advances inside it.
        """
        if self._peek() not in (b"{", b"[", b'"'):
            while (end := _SCALAR.match(self._data, self._index).end()) == len(self._data):  # type: ignore[union-attr]
                more()  # something must follow, if only the closing brace
            return end
        size = depth = 0
        while True:
            match = _TOKEN.search(self._data, self._index + size)
            if match is None or match.group() == b'"':
                if not keep:
                    self._index, size = match.start() if match else len(self._data), 0
                more()
                continue
            token, size = match.group(), match.end() - self._index
            if len(token) == 1:
                depth += 1 if token in b"{[" else -1
            elif of_line and b"\n" in token and _LINE.match(self._data, self._index):
                raise _NoValue
            if depth <= 0:
                return match.end()
            if not keep:
                self._index, size = match.end(), 0

    def _end_in_buffer(self) -> int | None:
        """Return the end of the value at the cursor; None if the buffer does not contain all of it."""

        def refuse() -> None:
            raise _NoValue

        try:
            return self._value_end(refuse)
        except _NoValue:
            return None

    def _end_before_mark(self) -> int:
        """Return the end of a value, confirmed by the character that follows it."""
        size = self._value_end(self._grow_held, of_line=True) - self._index
        while (mark := self._skip_space(self._index + size)) == len(self._data):
            self._grow_held()
        if not size or self._data[mark] not in b",}":
            raise _NoValue
        return self._index + size

    def _key(self) -> str:
        if self._peek() != b'"':
            raise self._broken("a key")
        try:
            return str(json.loads(self._take_until(self._value_end(self._grow))))
        except ValueError as error:
            raise self._broken("a key") from error

    def _expect(self, mark: bytes) -> None:
        if self._peek() != mark:
            raise self._broken(repr(mark.decode()))
        self._index += 1

    # -- the buffer -----------------------------------------------------------------------------------

    def _peek(self) -> bytes:
        """Move to the next byte that is not white space and return it; b"" at the end."""
        while True:
            self._index = self._skip_space(self._index)
            if self._index < len(self._data):
                return self._data[self._index : self._index + 1]
            if self._ended:
                return b""
            self._fill()

    def _skip_space(self, at: int) -> int:
        match = _SPACE.match(self._data, at)
        assert match is not None
        return match.end()

    def _fill(self, size: int = 0) -> None:
        """Buffer a block, and at least `size` bytes, from the cursor on, if the file has them."""
        parts, size = [self._data[self._index :]], max(BLOCK_BYTES, size)
        buffered = len(parts[0])
        while buffered < size and not self._ended:
            block = self._read(size - buffered)
            self._bytes_read += len(block)
            self._ended = not block
            parts.append(block)
            buffered += len(block)
        if len(parts) > 1:
            self._data, self._index = b"".join(parts), 0

    def _grow_held(self) -> None:
        if self._ended or len(self._data) - self._index > HELD_BYTES:
            raise _NoValue
        self._grow()

    def _grow(self) -> None:
        """Buffer more of one value; doubling keeps the work linear."""
        if self._ended:
            raise TraceFileError(
                f"{self.name}: the JSON ends too early, at byte {self._bytes_read:,}, in "
                f"{self._excerpt(len(self._data) - 40)!r}; the file is truncated - export it again"
            )
        self._fill(2 * (len(self._data) - self._index))

    # -- errors ---------------------------------------------------------------------------------------

    def _excerpt(self, start: int) -> str:
        return self._data[max(0, start) : max(0, start) + 40].decode("utf-8", "replace").strip()

    def _broken(self, expected: str) -> TraceFileError:
        if not self._peek():
            return TraceFileError(
                f"{self.name}: the JSON ends too early, at byte {self.position:,}, expected {expected}; the "
                "file is truncated - export it again"
            )
        return TraceFileError(
            f"{self.name}: expected {expected} at byte {self.position:,}, found "
            f"{self._excerpt(self._index)!r}; the file is not JSON as torch.profiler writes it - export "
            "it again"
        )

    def _foreign_format(self) -> str:
        return (
            f"{self.name}: expected the Chrome trace JSON of torch.profiler, an object with `traceEvents`, "
            f"found {self._excerpt(self._index)!r}; give the .json or .json.gz file that "
            "prof.export_chrome_trace wrote"
        )
