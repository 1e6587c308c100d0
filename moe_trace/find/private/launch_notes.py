"""What Inductor notes of the launches of one graph, and the form in which its cache on disk keeps that.

Inductor keeps compiled code on disk, but not which modules its nodes were traced in. So our notes are put
into what it keeps, beside the generated code that they are of: they come, move and go with it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_VERSION = 2
_BYTES_MAX = 4 << 20
_DECODED_MAX = 64 << 20


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


def encode_notes(notes: LaunchNotes, origins: Origins) -> bytes | None:
    """For the cache; None where that would be too large."""
    listed = {name for launch in notes.launches for name in launch.nodes}
    stacks: dict[tuple[str, ...], int] = {}

    def place(modules: tuple[str, ...]) -> int:
        return stacks.setdefault(modules, len(stacks))

    value = {
        "version": _VERSION,
        "backward": notes.backward,
        "problem": notes.problem,
        "launches": [[launch.kernel, launch.nodes] for launch in notes.launches],
        "nodes": [
            [node.name, node.target, place(node.modules), node.ours]
            for node in notes.nodes
            if node.name in listed
        ],
        "computes": origins.computes,
        "origins": [[place(modules), ours] for modules, ours in origins.nodes],
        "stacks": [*stacks],
    }
    encoded = zlib.compress(json.dumps(value).encode())
    return encoded if len(encoded) <= _BYTES_MAX else None


def decode_notes(encoded: Any, origins: Origins) -> LaunchNotes | None:
    """The notes as those of a graph of these origins.

    None for anything else, for another version, and where it is not known which modules stand for which.
    """
    if not isinstance(encoded, bytes):
        return None
    try:
        value = json.loads(zlib.decompressobj().decompress(encoded, _DECODED_MAX))
        if value["version"] != _VERSION:
            return None
        stacks = [tuple(map(str, stack)) for stack in value["stacks"]]
        there = tuple((stacks[place], bool(ours)) for place, ours in value["origins"])
        modules = origins.here(Origins(value["computes"], there))
        if modules is None:
            return None
        return LaunchNotes(
            tuple(LaunchNodes(str(kernel), tuple(map(str, nodes))) for kernel, nodes in value["launches"]),
            tuple(
                GraphNode(str(name), str(target), modules[stacks[place]], bool(ours))
                for name, target, place, ours in value["nodes"]
            ),
            bool(value["backward"]),
            str(value["problem"]),
        )
    except (zlib.error, ValueError, TypeError, LookupError, RecursionError):
        return None
