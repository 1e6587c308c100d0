"""Mapping of the kernel launches of compiled code to parts of MoE layers, from the compiler's provenance.

Compilations are observed from the moment when hooks become part of a graph until the tracer stops. A fused
kernel lists all nodes that it computes, including those that several kernels recompute because that is
cheaper than storing them: the nodes that no other kernel lists determine what it computes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from moe_trace.data.compiled_graph import CompiledGraph, CompiledLaunch, LaunchPart, Place
from moe_trace.find.private.inductor import listen_to_compiles, stop_listening
from moe_trace.find.private.launch_notes import GraphNode, LaunchNodes, LaunchNotes
from moe_trace.find.routers import RouterSite
from moe_trace.record.graphs.memory import captures_now

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "grouped_mm", "scaled_mm", "scaled_grouped_mm", "int_mm")
_GATHERS = ("index", "index_select", "gather", "take", "take_along_dim")
_WRITES = ("index_add", "index_put", "index_copy", "scatter", "scatter_add", "scatter_reduce")
_FREE = (  # operators that add no cost to a fused kernel
    *("view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "alias", "clone"),
    *("slice", "select", "split", "split_with_sizes", "getitem", "full", "iota", "constant_pad_nd"),
    "convert_element_type",
)
_MODULES, _ROOT = re.compile(r"\._modules\['([^']+)'\]"), re.compile(r"^\w+\[[^]]*\]\.?")
_GENERATED = ("triton_", "cpp_")
_GRAPHS_MAX = 1000


class LaunchLists:
    """The graphs that were compiled while one tracer was active."""

    def __init__(self, sites: Sequence[RouterSite]) -> None:
        self._places = {site.name: _places_in_block(site) for site in sites}
        """Path of a router -> path of a module of its layer -> the part that the module is."""
        self._found: dict[CompiledGraph, None] = {}

    def watch(self) -> None:
        """Start to observe compilations, since hooks are becoming part of a graph."""
        if not captures_now():
            listen_to_compiles(self._on_compile)

    def know(self, graphs: Iterable[CompiledGraph]) -> None:
        """Add graphs that an earlier tracer of the model collected."""
        self._found |= dict.fromkeys(graphs)

    def stop(self) -> None:
        """Stop observing compilations; the graphs are kept."""
        stop_listening(self._on_compile)

    def graphs(self) -> tuple[CompiledGraph, ...]:
        """Return the graphs that contain a router or experts, in the order of their compilation."""
        return tuple(self._found)

    def _on_compile(self, notes: LaunchNotes) -> None:
        graph = describe(notes, self._places)
        if _is_untraced(notes, graph):
            return
        if any(part.place != "block" for part in graph.parts) and len(self._found) < _GRAPHS_MAX:
            self._found[graph] = None


def _is_untraced(notes: LaunchNotes, graph: CompiledGraph) -> bool:
    """Return whether a forward of an MoE block contains none of our hooks, since its layer is not recorded.
    Relative to the compiled code, its modules may have the same paths as those of a recorded layer."""
    places = {part.place for part in graph.parts}
    return len(places) > 1 and "router" in places and not (notes.backward or any(n.ours for n in notes.nodes))


def _places_in_block(site: RouterSite) -> dict[str, Place]:
    block = site.router if site.block is None else site.block
    within = {id(module): name for name, module in block.named_modules()}
    router = within.get(id(site.router))
    if router is None and site.experts is not None and id(site.experts) not in within:
        return {}  # neither is a module of the model, as in vLLM: the nodes do not refer to them
    if router is None:
        return {site.name: "router"}
    above = site.name[: len(site.name) - len(router)].rstrip(".")
    modules: tuple[tuple[nn.Module | None, Place], ...] = (
        (block, "block"),
        (site.experts, "experts"),
        (site.router, "router"),
    )
    return {
        ".".join(filter(None, (above, within[id(module)]))): place
        for module, place in modules
        if id(module) in within
    }


def describe(notes: LaunchNotes, places: Mapping[str, Mapping[str, Place]]) -> CompiledGraph:
    """Return the launches of a graph, each with the parts of MoE layers that it computes."""
    launches = notes.launches
    known = {node.name: node for node in notes.nodes}
    part_of = {node.name: _part_of(node, places) for node in notes.nodes}
    if notes.problem:
        all_parts = tuple(dict.fromkeys(part for part in part_of.values() if part is not None))
        return CompiledGraph(
            parts=all_parts, launches=(), backward=notes.backward, problem=notes.problem, key=notes.key
        )
    listed = Counter(name for launch in launches for name in set(launch.nodes))
    libraries = {launch.nodes[0] for launch in launches if launch.nodes and not _is_generated(launch)}
    parts: dict[LaunchPart, int] = {}
    described = []
    for launch in launches:
        nodes = _own_nodes(launch, listed, libraries, known)
        found = dict.fromkeys(part_of[name] for name in nodes)
        operators = {_operator(known[name].target) for name in nodes}
        inside = [part for part in found if part is not None]
        described.append(
            CompiledLaunch(
                kernel=launch.kernel,
                generated=_is_generated(launch),
                parts=tuple(parts.setdefault(part, len(parts)) for part in inside),
                outside=None in found and bool(inside),
                product=any(operator in _PRODUCTS for operator in operators),
                gather=any(operator in _GATHERS for operator in operators),
                write=any(operator in _WRITES for operator in operators),
            )
        )
    return CompiledGraph(
        parts=tuple(parts), launches=tuple(described), backward=notes.backward, key=notes.key
    )


def _is_generated(launch: LaunchNodes) -> bool:
    return launch.kernel.startswith(_GENERATED)


def _own_nodes(
    launch: LaunchNodes, listed: Mapping[str, int], libraries: set[str], known: Mapping[str, GraphNode]
) -> list[str]:
    """Return the nodes that determine what a launch computes, as far as their origin is known."""
    if not _is_generated(launch):
        return [name for name in launch.nodes[:1] if name in known]
    computed = [name for name in launch.nodes if name in known and name not in libraries]
    working = [name for name in computed if _operator(known[name].target) not in _FREE]
    for candidates in ([name for name in working if listed[name] == 1], working, computed):
        in_modules = [name for name in candidates if known[name].modules]
        if in_modules:
            return in_modules
    return []


def _operator(target: str) -> str:
    """Return the operator's base name: `index_put` for `aten.index_put_.default`."""
    parts = target.removeprefix("<built-in function ").rstrip(">").split(".")
    name = parts[-2] if len(parts) > 1 else parts[0]
    return name.strip("_").removesuffix("_backward").removesuffix("_fallback")


def _part_of(node: GraphNode, places: Mapping[str, Mapping[str, Place]]) -> LaunchPart | None:
    """Return the part of an MoE layer that a node belongs to, by its innermost module; None if none."""
    if node.ours:
        return None
    for path in reversed(node.modules):
        module_path = _below_root(path)
        found = _matching(module_path, places) if module_path else {}
        if found:
            place = next(iter(found.values()))
            return LaunchPart(routers=tuple(found), place=place)
    return None


def _below_root(path: str) -> str:
    """Return `layers.0` for `L['self'].layers.0`, or for older torch's `L['self']._modules['layers']…`."""
    return _ROOT.sub("", _MODULES.sub(r".\1", path))


def _matching(path: str, places: Mapping[str, Mapping[str, Place]]) -> dict[str, Place]:
    """Return the parts with this path by router; the path may be relative to a compiled submodule."""
    return {
        router: place
        for router, modules in places.items()
        for name, place in modules.items()
        if name == path or name.endswith(f".{path}")
    }
