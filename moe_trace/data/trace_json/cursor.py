"""A cursor over one JSON object that is too large to hold: its keys, and their values one after another.

Kineto writes each key on a line of its own and turns every backslash into a slash, so that a quote in the
user's metadata ends its string too early, and the file is no JSON. Before the events, a value that does not
end where a value can is therefore taken to reach to the end of its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from moe_trace.data.errors import TraceFileError

BLOCK_BYTES = 4 * 2**20
HELD_BYTES = 16 * 2**20
"""Of one value before the events; what is longer is not read a second time."""
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\]]', re.DOTALL)
SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^,}\]\s]*+")
_LINE = re.compile(rb'([^\n]*[^\s,])[ \t]*,[ \t\r]*\n\s*"')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _NoValue(Exception):
    """What stands in a value's place is no JSON."""


class JsonCursor:
    """A cursor over one JSON object.

    Args:
        read: returns up to that many bytes, none at the end.
        name: of the file, for messages.
        held: what was read already, and comes first.
    """

    def __init__(self, read: Callable[[int], bytes], name: str, held: bytes = b"") -> None:
        self.name = name
        self._read = read
        self._data = held
        self._at = 0
        self._taken = len(held)
        self._ended = False
        self._in_head = False

    @property
    def position(self) -> int:
        """Offset of the cursor in what was read."""
        return self._taken - len(self._data) + self._at

    def walk(self) -> Iterator[str]:
        """The top-level keys; after each, the caller takes its value by one of the methods below."""
        self._fill(len(_BYTE_ORDER_MARK))
        if self._data.startswith(_BYTE_ORDER_MARK):
            self._at += len(_BYTE_ORDER_MARK)
        first = self._peek()
        if not first:
            raise TraceFileError(f"{self.name}: found an empty file; export the trace again")
        if first != b"{":
            raise TraceFileError(self._foreign())
        self._at += 1
        if self._peek() == b"}":
            self._at += 1
            self._require_end()
            return
        self._in_head = True
        for key in self._members():
            if key == "traceEvents" and not self._in_head:
                raise TraceFileError(f"{self.name}: found `traceEvents` twice; export the trace again")
            self._in_head &= key != "traceEvents"
            yield key

    def _members(self) -> Iterator[str]:
        """From a key on to the end of the object and of the file."""
        while True:
            key = self._key()
            self._expect(b":")
            yield key
            if self._ends_behind_value():
                return

    def _ends_behind_value(self) -> bool:
        """Whether the object ends here, and the file with it; else another key follows."""
        mark = self._peek()
        if mark not in (b",", b"}"):
            raise self._broken("a comma or the end of the object")
        self._at += 1
        if mark == b"}":
            self._require_end()
        return mark == b"}"

    def require_rest_of_object(self) -> None:
        """Read on from behind a value to the end.

        Raises:
            TraceFileError: what follows is not the rest of an object and of its file.
        """
        if not self._ends_behind_value():
            for _ in self._members():
                self.skip()

    def _require_end(self) -> None:
        if self._peek():
            raise self._broken("the end of the file")

    def value(self) -> bytes:
        """The next value's JSON text; where it is no JSON, its text as a string."""
        return self._held_value() if self._in_head else self._take_value(keep=True)

    def skip(self) -> None:
        """Pass over the next value."""
        if self._in_head:
            self._held_value()
        else:
            self._take_value(keep=False)

    # -- values and keys ------------------------------------------------------------------------------

    def _take_value(self, *, keep: bool) -> bytes:
        if self._peek() not in (b"{", b"[", b'"'):
            return self._scalar()
        parts, depth, position = [], 0, self._at
        while True:
            match = TOKEN.search(self._data, position)
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

    # -- values that may be no JSON -------------------------------------------------------------------

    def _held_value(self) -> bytes:
        """A value that stays in the buffer until what follows it shows that it is one."""
        self._peek()
        try:
            end = self._held_end()
        except _NoValue:
            end = None
        if end is None:
            line = _LINE.match(self._data, self._at)
            if line is None:
                return self._take_value(keep=True)  # which says what is wrong, or cannot be held
            self._at = line.end(1)
            return json.dumps(line.group(1).decode("utf-8", "replace")).encode()
        text = self._data[self._at : end]
        self._at = end
        return text

    def _held_end(self) -> int:
        while True:
            size = self._held_size()
            after = SPACE.match(self._data, self._at + size)
            assert after is not None
            if after.end() < len(self._data):
                break
            self._hold_more()
        if not size or self._data[after.end()] not in b",}":
            raise _NoValue
        return self._at + size

    def _held_size(self) -> int:
        if self._data[self._at : self._at + 1] not in (b"{", b"[", b'"'):
            match = _SCALAR.match(self._data, self._at)
            return match.end() - self._at if match else 0
        size = depth = 0
        while True:
            match = TOKEN.search(self._data, self._at + size)
            token = match.group() if match else b'"'
            if match is None or token == b'"':
                self._hold_more()
                continue
            size = match.end() - self._at
            if len(token) == 1:
                depth += 1 if token in b"{[" else -1
            elif b"\n" in token and _LINE.match(self._data, self._at):
                raise _NoValue  # from one line's last quote to the next line's first
            if depth <= 0:
                return size

    def _hold_more(self) -> None:
        """More of the file behind what is held."""
        held = len(self._data) - self._at
        if self._ended or held > HELD_BYTES:
            raise _NoValue
        self._fill(max(BLOCK_BYTES, 2 * held))

    # -- the buffer -----------------------------------------------------------------------------------

    def _peek(self) -> bytes:
        """The next byte that is not white space, where the cursor then stands; b"" at the end."""
        while True:
            match = SPACE.match(self._data, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._data):
                return self._data[self._at : self._at + 1]
            if self._ended:
                return b""
            self._fill_block()

    def _fill_block(self) -> None:
        self._fill(BLOCK_BYTES)

    def _fill(self, size: int) -> None:
        """Have at least `size` bytes from the cursor on, if the file has them."""
        parts = [self._data[self._at :]]
        have = len(parts[0])
        while have < size and not self._ended:
            block = self._read(size - have)
            self._taken += len(block)
            self._ended = not block
            parts.append(block)
            have += len(block)
        if len(parts) > 1:
            self._data, self._at = b"".join(parts), 0

    def _grow(self) -> None:
        """More of one value; doubling keeps the work linear."""
        if self._ended:
            raise TraceFileError(
                f"{self.name}: the JSON ends too early, at byte {self._taken:,}, in "
                f"{self._excerpt(len(self._data) - 40)!r}; the file is truncated - export it again"
            )
        self._fill(max(BLOCK_BYTES, 2 * (len(self._data) - self._at)))

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
            f"{self.name}: expected {expected} at byte {self.position:,}, found {self._excerpt(self._at)!r}; "
            "the file is not JSON as torch.profiler writes it - export it again"
        )

    def _foreign(self) -> str:
        return (
            f"{self.name}: expected the Chrome trace JSON of torch.profiler, an object with `traceEvents`, "
            f"found {self._excerpt(self._at)!r}; give the .json or .json.gz file that "
            "prof.export_chrome_trace wrote"
        )
