"""Which part of an MoE layer each launch of compiled code computes, by the compiler's provenance.

Asked for when a graph takes up the hooks, until the tracer stops. A fused kernel lists all nodes that it
computes, also those that several kernels compute again because that is cheaper than to store them: what it
is for are the nodes that no other kernel lists.
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
_FREE = (  # what a fused kernel does on its way, at no cost of its own
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
        """Router's path -> path of a module of its layer -> what that is."""
        self._found: dict[CompiledGraph, None] = {}

    def watch(self) -> None:
        """A graph takes up the hooks: listen to what is compiled from now on."""
        if not captures_now():
            listen_to_compiles(self._told)

    def know(self, graphs: Iterable[CompiledGraph]) -> None:
        """Those that an earlier tracer of the model was told of."""
        self._found |= dict.fromkeys(graphs)

    def stop(self) -> None:
        """Listen no more; what was told is kept."""
        stop_listening(self._told)

    def graphs(self) -> tuple[CompiledGraph, ...]:
        """Those with a router or experts in them, in the order in which they were compiled."""
        return tuple(self._found)

    def _told(self, notes: LaunchNotes) -> None:
        graph = describe(notes, self._places)
        if _is_untraced(notes, graph):
            return
        if any(part.place != "block" for part in graph.parts) and len(self._found) < _GRAPHS_MAX:
            self._found[graph] = None


def _is_untraced(notes: LaunchNotes, graph: CompiledGraph) -> bool:
    """Whether a forward of an MoE block holds none of our hooks, as that of a layer that is not recorded:
    its modules, seen from what was compiled, may have the paths of one that is."""
    places = {part.place for part in graph.parts}
    return len(places) > 1 and "router" in places and not (notes.backward or any(n.ours for n in notes.nodes))


def _places_in_block(site: RouterSite) -> dict[str, Place]:
    block = site.router if site.block is None else site.block
    within = {id(module): name for name, module in block.named_modules()}
    router = within.get(id(site.router))
    if router is None and site.experts is not None and id(site.experts) not in within:
        return {}  # neither is a module of the model, as with vLLM: nodes do not tell what they are of
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
    """The launches with the parts of the model that they compute."""
    launches = notes.launches
    known = {node.name: node for node in notes.nodes}
    part_of = {node.name: _part_of(node, places) for node in notes.nodes}
    if notes.problem:
        held = tuple(dict.fromkeys(part for part in part_of.values() if part is not None))
        return CompiledGraph(
            parts=held, launches=(), backward=notes.backward, problem=notes.problem, key=notes.key
        )
    listed = Counter(name for launch in launches for name in set(launch.nodes))
    libraries = {launch.nodes[0] for launch in launches if launch.nodes and not _is_generated(launch)}
    parts: dict[LaunchPart, int] = {}
    described = []
    for launch in launches:
        own = _own_nodes(launch, listed, libraries, known)
        found = dict.fromkeys(part_of[name] for name in own)
        operators = {_operator(known[name].target) for name in own}
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
    """The nodes that a launch is for, as far as it is known where they come from."""
    if not _is_generated(launch):
        return [name for name in launch.nodes[:1] if name in known]
    computed = [name for name in launch.nodes if name in known and name not in libraries]
    working = [name for name in computed if _operator(known[name].target) not in _FREE]
    for candidates in ([name for name in working if listed[name] == 1], working, computed):
        told = [name for name in candidates if known[name].modules]
        if told:
            return told
    return []


def _operator(target: str) -> str:
    """`index_put` of `aten.index_put_.default`."""
    parts = target.removeprefix("<built-in function ").rstrip(">").split(".")
    name = parts[-2] if len(parts) > 1 else parts[0]
    return name.strip("_").removesuffix("_backward").removesuffix("_fallback")


def _part_of(node: GraphNode, places: Mapping[str, Mapping[str, Place]]) -> LaunchPart | None:
    """The part of an MoE layer, by the innermost of its modules; None for the rest of the model."""
    if node.ours:
        return None
    for path in reversed(node.modules):
        wanted = _below_root(path)
        found = _matching(wanted, places) if wanted else {}
        if found:
            place = next(iter(found.values()))
            return LaunchPart(routers=tuple(found), place=place)
    return None


def _below_root(path: str) -> str:
    """`layers.0` of `L['self'].layers.0`, and of what older torch writes, `L['self']._modules['layers']…`."""
    return _ROOT.sub("", _MODULES.sub(r".\1", path))


def _matching(path: str, places: Mapping[str, Mapping[str, Place]]) -> dict[str, Place]:
    """The routers in whose layer a module of that path, as seen from what was compiled, is one of ours."""
    return {
        router: place
        for router, modules in places.items()
        for name, place in modules.items()
        if name == path or name.endswith(f".{path}")
    }
