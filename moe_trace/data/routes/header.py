"""What a file of routes says of itself, checked before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from moe_trace.data.routes.archive import Damaged
from moe_trace.data.routes.writer import FORMAT, TYPES, VERSION

HEADER_BYTES = 16 << 20
END_BYTES = 1 << 16
_MOST_GROUPS = 64
_MOST_LAYERS = 1 << 14
_MOST_SLOTS = 1 << 14
_MOST_TOKENS = 1 << 22
_MOST_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Group:
    """A group of layers that saw the same tokens."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    slots: int
    type: str

    def shape(self, column: str, tokens: int) -> tuple[int, ...]:
        """Of a column of some tokens."""
        if column in ("expert_ids", "weights"):
            return (tokens, len(self.layers), self.slots)
        return (tokens, len(self.layers)) if column == "lost_layers" else (tokens,)

    def dtype(self, column: str) -> np.dtype[Any]:
        """Of a column in the file."""
        return np.dtype(self.type if column == "expert_ids" else TYPES[column])

    def nbytes(self, column: str, tokens: int) -> int:
        """Of a column of some tokens."""
        return prod(self.shape(column, tokens)) * self.dtype(column).itemsize


@dataclass(frozen=True)
class Header:
    """The run, and the groups of layers."""

    run: Mapping[str, Any]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class ChunkEnd:
    """The last member of a chunk."""

    group_number: int
    group: Group
    tokens: int
    columns: Mapping[str, int]
    """CRC-32 of each."""
    dropped: Mapping[str, int]


def read_header(data: bytes) -> Header:
    """The header.

    Raises:
        Damaged: it is no header of this format, of another version, or tells what cannot be.
    """
    plain = _json(data, "header")
    if plain.get("format") != FORMAT:
        raise Damaged(f"a header of another format, {str(plain.get('format'))[:40]!r}")
    if plain.get("version") != VERSION:
        raise Damaged(f"version {str(plain.get('version'))[:20]} of the format where {VERSION} is known")
    groups = plain.get("groups")
    if not isinstance(groups, list) or not len(groups) <= _MOST_GROUPS:
        raise Damaged("a header without a list of groups of layers")
    run = {"rank": plain.get("rank", 0), "world_size": plain.get("world_size", 1)}
    run |= {"model": plain.get("model", {}), "versions": plain.get("versions", {})}
    if not (_is_count(run["rank"]) and _is_count(run["world_size"])):
        raise Damaged("a header whose rank is no number")
    if not (isinstance(run["model"], dict) and isinstance(run["versions"], dict)):
        raise Damaged("a header whose model or versions are no objects")
    return Header(run, tuple(map(_group, groups)))


def _group(plain: Any) -> Group:
    if not isinstance(plain, dict):
        raise Damaged("a group of layers that is no object")
    told: list[Any] = [plain.get(key) for key in ("layers", "num_experts", "top_k", "slots", "type")]
    layers, experts, top_k, slots, kind = told
    if (
        not isinstance(layers, list)
        or len(layers) > _MOST_LAYERS
        or not all(isinstance(n, str) for n in layers)
    ):
        raise Damaged("a group whose layers are no list of module paths")
    for name, numbers in (("num_experts", experts), ("top_k", top_k)):
        if not (isinstance(numbers, list) and len(numbers) == len(layers) and all(map(_is_count, numbers))):
            raise Damaged(f"a group whose {name} are no numbers, one for each layer")
    if not _is_count(slots) or slots > _MOST_SLOTS or kind not in ("|u1", "<u2"):
        raise Damaged(f"a group of {str(slots)[:20]} slots of type {str(kind)[:20]!r}")
    return Group(tuple(layers), tuple(experts), tuple(top_k), slots, kind)


def read_chunk_end(data: bytes, number: int, groups: tuple[Group, ...]) -> ChunkEnd:
    """What a chunk holds.

    Raises:
        Damaged: it is another chunk's, or tells what cannot be.
    """
    plain = _json(data, "end of a chunk")
    group, tokens, columns, dropped = map(plain.get, ("group", "tokens", "columns", "dropped"))
    if plain.get("chunk") != number or not _is_count(group) or group >= len(groups):
        raise Damaged(f"chunk {number} with another's end")
    if not _is_count(tokens) or tokens > _MOST_TOKENS:
        raise Damaged(f"chunk {number} of {str(tokens)[:20]} tokens")
    for mapping in (columns, dropped):
        if not isinstance(mapping, dict) or not all(map(_is_count, mapping.values())):
            raise Damaged(f"chunk {number} without a list of its columns")
    if (tokens and "expert_ids" not in columns) or not columns.keys() <= {"expert_ids", *TYPES}:
        raise Damaged(f"chunk {number} of other columns")
    found = groups[group]
    if max((found.nbytes(name, tokens) for name in columns), default=0) > _MOST_CHUNK_BYTES:
        raise Damaged(f"chunk {number} of {tokens:,} tokens, too large for one chunk")
    return ChunkEnd(group, found, tokens, columns, dropped)


def _json(data: bytes, what: str) -> Any:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"a {what} that is no JSON") from error
    if not isinstance(plain, dict):
        raise Damaged(f"a {what} that is no JSON object")
    return plain


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
