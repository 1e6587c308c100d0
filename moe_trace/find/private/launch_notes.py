"""Provenance of the launches of one graph, and its encoding in Inductor's cache on disk.

Inductor caches compiled code on disk, but not the modules that its nodes were traced in. Our notes are
therefore stored in the cache entry of the generated code, and are loaded, moved and deleted with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

_VERSION = 3
_BYTES_MAX = 4 << 20
_DECODED_MAX = 256 << 20


@dataclass(frozen=True)
class GraphNode:
    """An operator of a compiled graph."""

    name: str
    target: str
    """Name of the operator, such as `aten.mm.default`."""
    modules: tuple[str, ...]
    """Paths of the modules that it was traced in, outermost first, such as `L['self'].model.layers.0.mlp`;
    for an operator of a backward, those of the corresponding forward operator."""
    ours: bool = False
    """Whether it was called from this package, in a hook of the tracer."""


@dataclass(frozen=True)
class LaunchNodes:
    """A launch in the generated code: the kernel's name, and the names of its nodes."""

    kernel: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class LaunchNotes:
    """All launches of one graph in the order of the generated code, and the nodes that they compute."""

    launches: tuple[LaunchNodes, ...]
    nodes: tuple[GraphNode, ...]
    backward: bool
    problem: str = ""
    """Reason why these are not the launches of the generated code; empty if they are."""
    key: str = ""
    """Inductor's cache key of the graph, which a trace shows for each call; empty without the cache."""


@dataclass(frozen=True)
class Origins:
    """The modules in which the nodes of a graph were traced, before Inductor changed it.

    Inductor caches the same code for all graphs that compute the same, regardless of their modules, such as
    the layers of a model that are compiled one by one.
    """

    computes: str
    """Equal only for graphs with the same operators of the same arguments, in the same order."""
    nodes: tuple[tuple[tuple[str, ...], bool], ...]
    """`GraphNode.modules` and `GraphNode.ours` of each node."""

    def here(self, there: Origins) -> Mapping[tuple[str, ...], tuple[str, ...]] | None:
        """Return the mapping from modules of another graph to those of this one; None if it is ambiguous."""
        if self.computes != there.computes or len(self.nodes) != len(there.nodes):
            return None
        found: dict[tuple[str, ...], tuple[str, ...]] = {(): ()}
        for (modules, ours), (other_modules, other_ours) in zip(self.nodes, there.nodes, strict=True):
            if found.setdefault(other_modules, modules) != modules or ours != other_ours:
                return None
        return found


@dataclass(frozen=True)
class _Kept:
    """Content of the cache entry."""

    version: int
    notes: LaunchNotes
    origins: Origins


def encode_notes(notes: LaunchNotes, origins: Origins) -> bytes | None:
    """Encode notes for the cache; return None if they are too large."""
    listed = {name for launch in notes.launches for name in launch.nodes}
    nodes = tuple(node for node in notes.nodes if node.name in listed)
    stored = _Kept(_VERSION, replace(notes, nodes=nodes, key=""), origins)
    encoded = zlib.compress(msgspec.json.encode(stored))
    return encoded if len(encoded) <= _BYTES_MAX else None


def decode_notes(encoded: Any, origins: Origins) -> LaunchNotes | None:
    """Decode notes from the cache, with their modules replaced by those of `origins`.

    Returns None for invalid data, another version, or if there is no mapping of the modules.
    """
    if not isinstance(encoded, bytes):
        return None
    try:
        stored = msgspec.json.decode(zlib.decompressobj().decompress(encoded, _DECODED_MAX), type=_Kept)
        modules = origins.here(stored.origins) if stored.version == _VERSION else None
        if modules is None:
            return None
        nodes = tuple(replace(node, modules=modules[node.modules]) for node in stored.notes.nodes)
        return replace(stored.notes, nodes=nodes)
    except (zlib.error, msgspec.MsgspecError, LookupError, RecursionError):
        return None
