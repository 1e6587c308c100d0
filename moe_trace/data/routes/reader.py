"""Reading of route files. `writer.py` defines the format; `RoutesWriter` writes it."""

from __future__ import annotations

import io
import os
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.errors import TraceFileError
from moe_trace.data.routes.archive import Damaged, Member, is_finished, members
from moe_trace.data.routes.columns import ABSENT, COLUMNS, RecordedRoutes
from moe_trace.data.routes.header import (
    END_BYTES,
    HEADER_BYTES,
    ChunkEnd,
    Group,
    Header,
    read_chunk_end,
    read_header,
)
from moe_trace.data.routes.writer import RoutesWriter as RoutesWriter
from moe_trace.data.routes.writer import added_up
from moe_trace.data.routes.writer import save_routes as save_routes

SUFFIX = ".routes.npz"
_NO_HEADER = Header(groups=())
_NPY_HEADER_BYTES = 256
_FREE_BYTES, _EXPANSION = 1 << 30, 200
"""A file may expand to `_FREE_BYTES`, or to `_EXPANSION` times its own size."""
_CHUNK_MEMBER = re.compile(r"c(\d{6,9})\.(?:(\w{1,20})\.npy|json)")


class IncompleteRoutes(UserWarning):
    """The file was not closed, because the run continues or crashed. Its complete chunks were read."""


def read_routes(path: str | Path) -> RecordedRoutes:
    """Read a route file.

    A file that was not closed is read up to its last complete chunk; `RecordedRoutes.incomplete` and a
    warning report this.

    Raises:
        TraceFileError: the file is missing, damaged, or of another format.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if not file.seekable():
                raise TraceFileError(f"{name}: a pipe, where a file is expected; save it first")
            size = file.seek(0, os.SEEK_END)
            try:
                return _read(file, size, name)
            except Damaged as error:
                raise TraceFileError(
                    f"{name}: found {error}; expected a file of routes as RecordedRoutes.save and "
                    "`moe-trace run --routes` write them. Write it again, or bring other captures in with "
                    "`moe-trace routes import`"
                ) from error
    except OSError as error:
        raise TraceFileError(
            f"{name}: cannot be read ({error.strerror or error}), expected a file of routes "
            f"(*{SUFFIX}); check the path"
        ) from error


@dataclass
class _Contents:
    """Contents of the headers and of the ends of chunks."""

    header: Header = _NO_HEADER
    headers: int = 0
    chunks: list[tuple[ChunkEnd, dict[str, Member]]] = field(default_factory=list)
    whole_bytes: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of layers; one without layers if there is none."""
        return self.header.groups or (Group((), (), (), 0, "|u1"),)

    def ends(self, number: int) -> list[ChunkEnd]:
        """Return the ends of a group's chunks."""
        return [end for end, _ in self.chunks if end.group == number]


def _read(file: BinaryIO, size: int, shown: str) -> RecordedRoutes:
    if not size:
        raise Damaged("an empty file")
    contents, incomplete = _Contents(), ""
    finished = is_finished(file, size)
    try:
        _scan(file, size, contents)
    except Damaged:
        if finished or not contents.chunks:
            raise
    if not contents.headers or not (finished or contents.chunks):
        raise Damaged("a file that ends before its first whole chunk")
    groups, header = contents.groups, contents.header
    total = sum(groups[end.group].nbytes(name, end.tokens) for end, own in contents.chunks for name in own)
    if total > max(_FREE_BYTES, _EXPANSION * size):  # before memory is allocated
        raise Damaged(f"{size:,} bytes that would expand to {total:,}")
    columns = _columns(file, contents, finished)
    if not finished:
        tokens = sum(end.tokens for end, _ in contents.chunks)
        incomplete = (
            f"not closed: its run goes on or has crashed. {len(contents.chunks)} whole chunks of {tokens:,} "
            f"tokens were read; the last {size - contents.whole_bytes:,} bytes hold no whole chunk"
        )
        warnings.warn(f"{shown}: {incomplete}", IncompleteRoutes, stacklevel=3)
    first, *others = [
        RecordedRoutes(
            layers=group.layers,
            num_experts=group.num_experts,
            top_k=group.top_k,
            dropped=added_up(end.dropped for end in contents.ends(number)),
            incomplete=incomplete,
            rank=header.rank,
            world_size=header.world_size,
            model=header.model,
            versions=header.versions,
            **columns[number],
        )
        for number, group in enumerate(groups)
    ]
    return replace(first, others=tuple(others))


def _scan(file: BinaryIO, size: int, contents: _Contents) -> None:
    waiting: dict[str, Member] = {}
    for member in members(file, size):
        if member.name == f"header.{contents.headers}.json" and not waiting:
            header = read_header(member.read(file, HEADER_BYTES))
            known = contents.header.groups
            if known and (header.groups[: len(known)] != known or len(header.groups) == len(known)):
                raise Damaged("a second header that contradicts the first")
            contents.header, contents.headers = header, contents.headers + 1
            continue
        match = _CHUNK_MEMBER.fullmatch(member.name)
        if match is None or int(match[1]) != len(contents.chunks):
            raise Damaged(f"a member {member.name!r} that has no place here")
        if not contents.headers:
            raise Damaged("no header")
        if match[2] is not None:
            waiting[match[2]] = member
            if len(waiting) > len(COLUMNS):
                raise Damaged(f"chunk {len(contents.chunks)} of other columns")
            continue
        end = read_chunk_end(member.read(file, END_BYTES), len(contents.chunks), contents.header.groups)
        if end.columns != {name: column.crc for name, column in waiting.items()}:
            raise Damaged(f"chunk {len(contents.chunks)} without the columns that it names")
        contents.chunks.append((end, waiting))
        contents.whole_bytes = member.start + member.compressed
        waiting = {}
    if waiting:
        raise Damaged(f"chunk {len(contents.chunks)} without its end")


def _columns(file: BinaryIO, contents: _Contents, finished: bool) -> list[dict[str, Any]]:
    """Return the columns of each group, with optional ones if any chunk has them. If the file was not closed,
    chunks from the first damaged one on are left out."""
    columns: list[dict[str, Any]] = []
    for number, group in enumerate(contents.groups):
        ends = contents.ends(number)
        absent = ABSENT.keys() - {name for end in ends for name in end.columns}
        tokens = sum(end.tokens for end in ends)
        columns.append(
            {
                name: np.empty(group.shape(name, tokens), group.dtype(name).newbyteorder("="))
                for name in COLUMNS
                if name not in absent
            }
        )
    filled = [0] * len(columns)
    for place, (end, found) in enumerate(contents.chunks):
        start = filled[end.group]
        filled[end.group] += end.tokens
        group = contents.groups[end.group]
        try:
            for name, column in columns[end.group].items():
                rows = column[start : filled[end.group]]
                rows[...] = (
                    _array(file, found[name], name, group, end.tokens) if name in found else ABSENT[name]
                )
        except Damaged:
            if finished or not place:
                raise
            del contents.chunks[place:]
            contents.whole_bytes = min(member.start for member in found.values())
            return _columns(file, contents, finished)
    return columns


def _array(file: BinaryIO, member: Member, name: str, group: Group, tokens: int) -> np.ndarray:
    _, *inner_shape = group.shape(name, tokens)
    shape = (inner_shape[0], tokens, *inner_shape[1:]) if inner_shape else (tokens,)
    dtype, nbytes = group.dtype(name), group.nbytes(name, tokens)
    data = member.read(file, nbytes + _NPY_HEADER_BYTES)
    buffer = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(buffer) != (1, 0):
            raise ValueError("another version of .npy")
        found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(buffer)
    except (ValueError, SyntaxError, TypeError) as error:
        raise Damaged(f"{member.name} that is no array of numbers") from error
    if found_shape != shape or fortran or found_dtype != dtype or len(data) - buffer.tell() != nbytes:
        raise Damaged(f"{member.name} of {found_dtype} {found_shape} where {dtype} {shape} is expected")
    if dtype == np.bool_ and max(data[buffer.tell() :], default=0) > 1:
        raise Damaged(f"{member.name} with bytes that are neither 0 nor 1")
    array: np.ndarray = np.frombuffer(data, dtype, offset=buffer.tell()).reshape(shape)
    if name == "stage_codes" and array.max(initial=0) >= len(STAGES):
        raise Damaged(f"{member.name} with an unknown stage")
    return np.moveaxis(array, 0, 1) if inner_shape else array


def routes_beside(trace: Path) -> Path | None:
    """Return `NAME.pt.trace.routes.npz` or `NAME.routes.npz` next to `NAME.pt.trace.json`, gzipped or not."""
    stem = trace.name.removesuffix(".gz").removesuffix(".json")
    paths = (trace.with_name(name + SUFFIX) for name in (stem, stem.removesuffix(".pt.trace")))
    return next((path for path in paths if path.is_file()), None)
