"""Metadata of a route file: its header and the end of each chunk, validated on reading."""

from __future__ import annotations

import json
from math import prod
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from moe_trace.data.routes.archive import Damaged
from moe_trace.data.version import __version__

FORMAT = "moe_trace routes"
VERSION = 1
TYPES: dict[str, str] = {
    "padding": "|b1",
    "step": "<i8",
    "forward": "<i8",
    "sequence": "<i4",
    "position": "<i4",
    "stage_codes": "|u1",
    "recomputed": "|b1",
    "token_ids": "<i4",
    "lost_layers": "|b1",
    "weights": "<f2",
}
"""Types in the file; the header has that of `expert_ids`."""
HEADER_BYTES = 16 << 20
END_BYTES = 1 << 16
_MOST_CHUNK_BYTES = 1 << 28

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Slots = Annotated[int, Meta(ge=0, le=1 << 14)]
_Tokens = Annotated[int, Meta(ge=0, le=1 << 22)]
_Read = TypeVar("_Read", bound=msgspec.Struct)


def column_shape(column: str, tokens: int, layers: int, slots: int) -> tuple[int, ...]:
    """Return a column's shape for some tokens."""
    if column in ("expert_ids", "weights"):
        return (tokens, layers, slots)
    return (tokens, layers) if column == "lost_layers" else (tokens,)


class Group(msgspec.Struct, frozen=True):
    """A group of layers that saw the same tokens."""

    layers: Annotated[tuple[str, ...], Meta(max_length=1 << 14)]
    num_experts: tuple[_Count, ...]
    top_k: tuple[_Count, ...]
    slots: _Slots
    type: Literal["|u1", "<u2"]

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.num_experts) == len(self.top_k):
            raise ValueError("num_experts and top_k are not one number for each layer")

    def shape(self, column: str, tokens: int) -> tuple[int, ...]:
        """Return a column's shape for some tokens."""
        return column_shape(column, tokens, len(self.layers), self.slots)

    def dtype(self, column: str) -> np.dtype[Any]:
        """Return a column's dtype in the file."""
        return np.dtype(self.type if column == "expert_ids" else TYPES[column])

    def nbytes(self, column: str, tokens: int) -> int:
        """Return a column's bytes for some tokens."""
        return prod(self.shape(column, tokens)) * self.dtype(column).itemsize


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Description of the run and of the groups of layers."""

    format: str = FORMAT
    version: int = VERSION
    moe_trace: Any = __version__
    rank: _Count = 0
    world_size: _Count = 1
    model: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    groups: Annotated[tuple[Group, ...], Meta(max_length=64)]


class ChunkEnd(msgspec.Struct, frozen=True):
    """The last member of a chunk."""

    chunk: _Count
    group: _Count
    """Index among the header's groups."""
    tokens: _Tokens
    columns: dict[str, _Count]
    """CRC-32 of each column."""
    dropped: dict[str, _Count]


def json_bytes(struct: msgspec.Struct) -> bytes:
    """Encode as a member of the archive; values of a model's config that are not JSON become text."""

    def plain(value: Any) -> Any:
        return msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else str(value)

    return json.dumps(msgspec.structs.asdict(struct), default=plain).encode()


def read_header(data: bytes) -> Header:
    """Decode the header.

    Raises:
        Damaged: it is not a header of this format and version, or is invalid.
    """
    plain = _json(data, "a header")
    if plain.get("format") != FORMAT:
        raise Damaged(f"a header of another format, {str(plain.get('format'))[:40]!r}")
    if plain.get("version") != VERSION:
        raise Damaged(f"version {str(plain.get('version'))[:20]} of the format where {VERSION} is known")
    return _convert(plain, Header, "a header")


def read_chunk_end(data: bytes, number: int, groups: tuple[Group, ...]) -> ChunkEnd:
    """Decode the end of a chunk.

    Raises:
        Damaged: it belongs to another chunk, or is invalid.
    """
    end = _convert(_json(data, f"an end of chunk {number}"), ChunkEnd, f"an end of chunk {number}")
    if end.chunk != number or end.group >= len(groups):
        raise Damaged(f"chunk {number} with another's end")
    columns = end.columns.keys()
    if (end.tokens and "expert_ids" not in columns) or not columns <= {"expert_ids", *TYPES}:
        raise Damaged(f"chunk {number} of other columns")
    group = groups[end.group]
    if max((group.nbytes(name, end.tokens) for name in columns), default=0) > _MOST_CHUNK_BYTES:
        raise Damaged(f"chunk {number} of {end.tokens:,} tokens, too large for one chunk")
    return end


def _json(data: bytes, what: str) -> dict[str, Any]:
    try:
        plain = json.loads(data)  # a config may contain NaN, which only json reads
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} that is no JSON") from error
    if not isinstance(plain, dict):
        raise Damaged(f"{what} that is no JSON object")
    return plain


def _convert(plain: dict[str, Any], kind: type[_Read], what: str) -> _Read:
    try:
        return msgspec.convert(plain, kind)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} of another form ({error!s:.200})") from error
