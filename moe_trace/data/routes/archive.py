"""The members of a zip archive in the order in which they were written, from their own headers.

`zipfile` reads an archive's directory, which stands at its end and is missing after a crash. Here nothing is
believed: a member is decompressed up to the size that its caller expects, and its CRC-32 must hold.
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
    """What was found, and at which byte."""


@dataclass(frozen=True)
class Member:
    """One member of an archive."""

    name: str
    method: int
    crc: int
    start: int
    """Of its data."""
    compressed: int
    size: int

    def read(self, file: BinaryIO, most: int) -> bytes:
        """Its data, decompressed.

        Raises:
            Damaged: it is larger than `most` bytes, or does not hold together.
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
    """The members, up to the archive's directory or to the end of the file.

    Raises:
        Damaged: something else stands there, or the file ends within a member.
    """
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(_LOCAL.size)
        if head.startswith((_DIRECTORY, _END)):
            return
        if len(head) < _LOCAL.size or not head.startswith(_SIGNATURE):
            raise Damaged(f"no member of a zip archive at byte {place:,}")
        _, _, flags, method, _, _, crc, compressed, whole, name_bytes, extra_bytes = _LOCAL.unpack(head)
        name = file.read(min(name_bytes, _NAME_BYTES)).decode("ascii", "replace")
        start = place + _LOCAL.size + name_bytes + extra_bytes
        place = start + compressed
        if flags & ~0b110 or method not in (STORED, DEFLATED) or name_bytes > _NAME_BYTES or place > size:
            raise Damaged(f"a member at byte {start:,} that is cut, encrypted or of another writer")
        yield Member(name, method, crc, start, compressed, whole)


def is_finished(file: BinaryIO, size: int) -> bool:
    """Whether the archive's directory ends the file, as it does when it was closed."""
    file.seek(max(0, size - _END_BYTES))
    return file.read(_END_BYTES).startswith(_END)
