"""`RoutesWriter`: appends routes to a file during a run.

The file is a zip archive that `numpy.load` opens. Its members, in this order:

- `header.0.json`: format version, model, versions, rank, and the groups of layers: paths, experts, top-k,
  slots and type of the ids. A group encountered later adds another header, `header.1.json`, with all groups
  so far.
- for each chunk, `c000000.expert_ids.npy` and the other columns of up to `CHUNK_BYTES` of ids of one group,
  then `c000000.json`, with the group, the number of tokens, the CRC-32 of each column, and what was dropped.
  A chunk is valid once that last member exists.

Columns of [T, L, K] are written as [L, T, K], as deflate compresses similar tokens of one layer well.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from moe_trace.data.errors import OutputError
from moe_trace.data.files import whole_file
from moe_trace.data.routes.header import TYPES, ChunkEnd, Group, Header, json_bytes

CHUNK_BYTES = 2 << 20


class Part(Protocol):
    """The part of `RecordedRoutes` that is written."""

    @property
    def described(self) -> Group: ...
    @property
    def run(self) -> Mapping[str, Any]: ...
    @property
    def dropped(self) -> Mapping[str, int]: ...
    @property
    def groups(self) -> Sequence[Part]: ...
    def columns(self) -> dict[str, np.ndarray]: ...


@dataclass
class _Waiting:
    """Tokens of layers that see the same tokens, waiting to fill a chunk."""

    group: Group
    parts: list[dict[str, np.ndarray]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(len(columns["expert_ids"]) for columns in self.parts)

    @property
    def chunk_tokens(self) -> int:
        return max(1, min(1 << 16, CHUNK_BYTES // max(1, self.group.nbytes("expert_ids", 1))))


class RoutesWriter:
    """Appends routes to a file in chunks; also a context manager.

    Appended tokens wait in memory until they fill a chunk of 2 MiB of ids; `flush` writes them at once. After
    a crash the file can be read up to its last complete chunk.

    Args:
        path: the file, by convention `<stem of the trace>.routes.npz`; replaced if it exists.
        level: zlib compression level, 0 to 9.

    Raises:
        OutputError: the file cannot be written, here or later.
    """

    def __init__(self, path: str | Path, *, level: int = 1) -> None:
        self.path = Path(path)
        self._level = level
        self._groups: dict[tuple[str, ...], _Waiting] = {}
        self._run: Mapping[str, Any] = {}
        self._headers = self._chunks = 0
        self._closed = True
        with self._explain_unwritable():
            self._file = self.path.open("wb")
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=level)
        self._closed = False

    def append(self, part: Part) -> None:
        """Add the tokens of a part, including its other groups.

        Raises:
            ValueError: a layer's experts, top-k, slots or type differ from those of earlier parts, or a value
                does not fit its column.
            OutputError: the disk is full.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed; open another file")
        known = len(self._groups)
        pairs = [(self._group(group), group) for group in part.groups]
        self._run = self._run or part.run
        if len(self._groups) > known or not self._headers:
            self._write_header()
        for waiting, group in pairs:
            self._add_part(waiting, group)

    def flush(self) -> None:
        """Write waiting tokens as chunks and pass them to the operating system."""
        for waiting in self._groups.values():
            if waiting.parts or waiting.dropped:
                self._write_chunk(waiting)

    def close(self) -> None:
        """Write waiting tokens and the archive's directory; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._headers:
                self._write_header()
            self.flush()
        finally:
            with self._explain_unwritable():
                self._zip.close()
                self._file.close()

    def __enter__(self) -> RoutesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # otherwise the archive would be closed without the waiting tokens
            self.close()

    def _group(self, part: Part) -> _Waiting:
        found = part.described
        waiting = self._groups.setdefault(found.layers, _Waiting(found))
        for name in ("num_experts", "top_k", "slots", "type"):
            expected, given = getattr(waiting.group, name), getattr(found, name)
            if expected != given:
                raise ValueError(f"expected parts with the {name} of the first, {expected}; found {given}")
        return waiting

    def _add_part(self, waiting: _Waiting, part: Part) -> None:
        columns = {name: _cast(name, column) for name, column in part.columns().items()}
        waiting.dropped = added_up([waiting.dropped, part.dropped])
        if waiting.parts and waiting.parts[0].keys() != columns.keys():
            self._write_chunk(waiting)
        tokens, start = len(columns["expert_ids"]), 0
        if not tokens and not waiting.parts:
            waiting.parts.append(columns)  # keeps the set of columns
        while start < tokens:
            end = min(tokens, start + waiting.chunk_tokens - waiting.tokens)
            waiting.parts.append({name: column[start:end].copy() for name, column in columns.items()})
            start = end
            if waiting.tokens >= waiting.chunk_tokens:
                self._write_chunk(waiting)

    def _write_header(self) -> None:
        header = Header(groups=tuple(waiting.group for waiting in self._groups.values()), **self._run)
        self._write(f"header.{self._headers}.json", json_bytes(header))
        self._headers += 1

    def _write_chunk(self, waiting: _Waiting) -> None:
        name = f"c{self._chunks:06}"
        checksums: dict[str, int] = {}
        for column in waiting.parts[0] if waiting.parts else ():
            data = _npy(np.concatenate([columns[column] for columns in waiting.parts]))
            checksums[column] = zlib.crc32(data)
            self._write(f"{name}.{column}.npy", data)
        number = list(self._groups).index(waiting.group.layers)
        end = ChunkEnd(self._chunks, number, waiting.tokens, checksums, waiting.dropped)
        self._write(f"{name}.json", json_bytes(end))
        self._chunks += 1
        waiting.parts, waiting.dropped = [], {}
        with self._explain_unwritable():
            self._file.flush()

    def _write(self, name: str, data: bytes) -> None:
        member = zipfile.ZipInfo(name)  # dated 1980, so that equal routes give equal bytes
        member.compress_type = zipfile.ZIP_DEFLATED
        with self._explain_unwritable():
            self._zip.writestr(member, data, compresslevel=self._level)

    @contextmanager
    def _explain_unwritable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror or error}); free some space or choose "
                "another folder. What was appended before can be read up to the last whole chunk"
            ) from error


def save_routes(routes: Part, path: str | Path, *, level: int = 1) -> Path:
    """Write routes to a file, atomically, and return the path.

    Raises:
        OutputError: the file cannot be written.
    """
    with whole_file(path) as temporary, RoutesWriter(temporary, level=level) as writer:
        writer.append(routes)
    return Path(os.fspath(path))


def added_up(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum of token counts by reason."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return {reason: int(tokens) for reason, tokens in total.items()}


def _cast(name: str, column: np.ndarray) -> np.ndarray:
    dtype = np.dtype(TYPES[name]) if name in TYPES else column.dtype.newbyteorder("<")
    if column.dtype == dtype:
        return column
    with np.errstate(over="ignore"):
        typed = column.astype(dtype)
    if not np.array_equal(typed, column, equal_nan=dtype.kind == "f"):
        raise ValueError(f"expected {name} to fit {dtype}; found other values, of {column.dtype}")
    return typed


def _npy(column: np.ndarray) -> bytes:
    """Encode as `numpy.save` does, layers first."""
    buffer = io.BytesIO()
    layers_first = np.moveaxis(column, 1, 0) if column.ndim > 1 else column
    np.lib.format.write_array(buffer, np.ascontiguousarray(layers_first), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
