"""Members of a zip archive in the order of writing, read from their local headers.

`zipfile` reads an archive's directory, which is at its end and missing after a crash. Nothing in the file is
trusted here: a member is decompressed up to the size that the caller expects, and its CRC-32 must match.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_LOCAL = struct.Struct("<4s5H3I2H")
_SIGNATURE, _DIRECTORY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_BYTES = 22
_NAME_BYTES = 64
STORED, DEFLATED = 0, 8


class Damaged(Exception):
    """The archive is damaged; the message says what was found where."""


@dataclass(frozen=True)
class Member:
    """One member of an archive."""

    name: str
    method: int
    crc: int
    start: int
    """Offset of its data."""
    compressed: int
    size: int

    def read(self, file: BinaryIO, most: int) -> bytes:
        """Return its data, decompressed.

        Raises:
            Damaged: it is larger than `most` bytes, or corrupt.
        """
        if self.size > most or self.compressed > most + most // 1000 + 64:
            raise Damaged(f"{self.name} of {self.size:,} bytes where at most {most:,} are expected")
        file.seek(self.start)
        data = file.read(self.compressed)
        if self.method == DEFLATED:
            decoder = zlib.decompressobj(-15)
            try:
                data = decoder.decompress(data, self.size + 1)
            except zlib.error as error:
                raise Damaged(f"{self.name} at byte {self.start:,} that does not decompress") from error
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise Damaged(f"{self.name} at byte {self.start:,} whose checksum does not hold")
        return data


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the members, up to the archive's directory or the end of the file.

    Raises:
        Damaged: there is something else, or the file ends within a member.
    """
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(_LOCAL.size)
        if head.startswith((_DIRECTORY, _END)):
            return
        if len(head) < _LOCAL.size or not head.startswith(_SIGNATURE):
            raise Damaged(f"no member of a zip archive at byte {place:,}")
        _, _, flags, method, _, _, crc, compressed, uncompressed, name_bytes, extra_bytes = _LOCAL.unpack(
            head
        )
        name = file.read(min(name_bytes, _NAME_BYTES)).decode("ascii", "replace")
        start = place + _LOCAL.size + name_bytes + extra_bytes
        place = start + compressed
        if flags & ~0b110 or method not in (STORED, DEFLATED) or name_bytes > _NAME_BYTES or place > size:
            raise Damaged(f"a member at byte {start:,} that is cut, encrypted or of another writer")
        yield Member(name, method, crc, start, compressed, uncompressed)


def is_finished(file: BinaryIO, size: int) -> bool:
    """Return whether the file ends with the archive's directory, that is, was closed."""
    file.seek(max(0, size - _END_BYTES))
    return file.read(_END_BYTES).startswith(_END)
