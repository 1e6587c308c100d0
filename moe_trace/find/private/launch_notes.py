"""What Inductor notes of the launches of one graph, and the form in which its cache on disk keeps that.

Inductor keeps compiled code on disk, but not which modules its nodes were traced in. So our notes are put
into what it keeps, beside the generated code that they are of: they come, move and go with it.
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
    """An operator of a graph that was compiled."""

    name: str
    target: str
    """As `aten.mm.default`."""
    modules: tuple[str, ...]
    """Paths of the modules that it was traced in, outermost first, such as `L['self'].model.layers.0.mlp`;
    of a backward's operator, those of the forward's."""
    ours: bool = False
    """Whether it was called from this package, in a hook of the tracer."""


@dataclass(frozen=True)
class LaunchNodes:
    """One launch, in the order of the generated code: the kernel's name, and the names of its nodes."""

    kernel: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class LaunchNotes:
    """All launches of one graph, and the nodes that they compute."""

    launches: tuple[LaunchNodes, ...]
    nodes: tuple[GraphNode, ...]
    backward: bool
    problem: str = ""
    """Why these are not the launches that the generated code makes."""
    key: str = ""
    """Inductor's, of the graph in its cache, which a trace shows of each call; empty without that cache."""


@dataclass(frozen=True)
class Origins:
    """Where the nodes of a graph were traced, before Inductor changed it.

    Inductor keeps one code for all graphs that compute the same, in whatever modules: those of the layers of
    a model, where they are compiled one by one.
    """

    computes: str
    """Equal only for graphs with the same operators of the same arguments, in the same order."""
    nodes: tuple[tuple[tuple[str, ...], bool], ...]
    """Of each node `GraphNode.modules` and `GraphNode.ours`."""

    def here(self, there: Origins) -> Mapping[tuple[str, ...], tuple[str, ...]] | None:
        """Modules of another graph -> those of this one; None where these are not known, node by node."""
        if self.computes != there.computes or len(self.nodes) != len(there.nodes):
            return None
        found: dict[tuple[str, ...], tuple[str, ...]] = {(): ()}
        for (mine, ours), (theirs, also) in zip(self.nodes, there.nodes, strict=True):
            if found.setdefault(theirs, mine) != mine or ours != also:
                return None
        return found


@dataclass(frozen=True)
class _Kept:
    """What stands in the cache."""

    version: int
    notes: LaunchNotes
    origins: Origins


def encode_notes(notes: LaunchNotes, origins: Origins) -> bytes | None:
    """For the cache; None where that would be too large."""
    listed = {name for launch in notes.launches for name in launch.nodes}
    nodes = tuple(node for node in notes.nodes if node.name in listed)
    kept = _Kept(_VERSION, replace(notes, nodes=nodes, key=""), origins)
    encoded = zlib.compress(msgspec.json.encode(kept))
    return encoded if len(encoded) <= _BYTES_MAX else None


def decode_notes(encoded: Any, origins: Origins) -> LaunchNotes | None:
    """The notes as those of a graph of these origins.

    None for anything else, for another version, and where it is not known which modules stand for which.
    """
    if not isinstance(encoded, bytes):
        return None
    try:
        kept = msgspec.json.decode(zlib.decompressobj().decompress(encoded, _DECODED_MAX), type=_Kept)
        modules = origins.here(kept.origins) if kept.version == _VERSION else None
        if modules is None:
            return None
        nodes = tuple(replace(node, modules=modules[node.modules]) for node in kept.notes.nodes)
        return replace(kept.notes, nodes=nodes)
    except (zlib.error, msgspec.MsgspecError, LookupError, RecursionError):
        return None
