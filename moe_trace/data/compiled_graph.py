"""Kernel launches of graphs compiled by `torch.compile`, and the part of an MoE layer each one computes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

BY_COMPILER = "by the compiler's provenance"
"""Label of times attributed by torch's provenance tracking of each launch."""
Place = Literal["router", "experts", "block"]
"""Inside the router, inside the experts, or elsewhere in their MoE block."""


@dataclass(frozen=True, kw_only=True)
class LaunchPart:
    """A part of the model that a launch computes."""

    routers: tuple[str, ...]
    """Module paths of the layer's routers; several where layers share compiled code, which runs once per
    layer."""
    place: Place

    def router(self, number: int, runs: int, among: Container[str]) -> str | None:
        """Return the router of a run of the graph, or None; layers that share the graph run it in order.

        Args:
            number: index of the run among the graph's `runs` in the forward.
            among: routers called by the forward.
        """
        routers = [name for name in self.routers if name in among]
        return routers[number] if len(routers) == runs else None


@dataclass(frozen=True, kw_only=True)
class CompiledLaunch:
    """One launch of the generated code: a generated kernel or a library call."""

    kernel: str
    """Name of the generated kernel as in a trace; for a library call, the operator."""
    generated: bool
    """Whether it is a single kernel of that name. A library call runs any number of kernels of any name."""
    parts: tuple[int, ...] = ()
    """Indices into `CompiledGraph.parts`; empty for the rest of the model, several for a fused launch."""
    outside: bool = False
    """Whether it also computes a part of the rest of the model."""
    product: bool = False
    """Whether it is or contains a matrix product."""
    gather: bool = False
    """Whether it gathers rows."""
    write: bool = False
    """Whether it writes rows back."""


@dataclass(frozen=True, kw_only=True)
class CompiledGraph:
    """Launches of one compiled graph, in the order of its generated code, by the compiler's provenance."""

    parts: tuple[LaunchPart, ...]
    launches: tuple[CompiledLaunch, ...]
    """Empty if there is a `problem`."""
    backward: bool = False
    problem: str = ""
    """Why the launches are unknown, and what to do about it."""
    key: str = ""
    """Key of the graph in Inductor's cache, as a trace shows it for each call; empty if unknown."""


_FLAGS = ("generated", "outside", "product", "gather", "write")
_VERSIONS = (1, 2)
"""Version 1 has no `problem`; the last version is the one written."""


def encode_compiled(graphs: Sequence[CompiledGraph]) -> dict[str, Any]:
    """Return JSON with each kernel name once; a launch is its index, its flags as bits, and its parts."""
    kernels: dict[str, int] = {}
    encoded = []
    for graph in graphs:
        launches = [
            [
                kernels.setdefault(launch.kernel, len(kernels)),
                sum(getattr(launch, flag) << bit for bit, flag in enumerate(_FLAGS)),
                *launch.parts,
            ]
            for launch in graph.launches
        ]
        parts = [[part.place, *part.routers] for part in graph.parts]
        fields = {"parts": parts, "launches": launches, "backward": graph.backward}
        optional = {"problem": graph.problem, "key": graph.key}
        encoded.append(fields | {name: text for name, text in optional.items() if text})
    return {"version": _VERSIONS[-1], "kernels": [*kernels], "graphs": encoded}


def decode_compiled(value: Any) -> tuple[CompiledGraph, ...]:
    """Decode the value written by `encode_compiled`; empty for None and later versions.

    Raises:
        ValueError, TypeError, LookupError: the JSON has another form.
    """
    if value is None or value["version"] not in _VERSIONS:
        return ()
    kernels = [str(kernel) for kernel in value["kernels"]]
    graphs = []
    for graph in value["graphs"]:
        parts = tuple(
            LaunchPart(routers=tuple(map(str, names)), place=_place(p)) for p, *names in graph["parts"]
        )
        launches = []
        for kernel, flags, *places in graph["launches"]:
            if not 0 <= kernel < len(kernels) or not all(0 <= place < len(parts) for place in places):
                raise ValueError(f"expected {len(kernels)} kernels and {len(parts)} parts, found others")
            launch_flags = {flag: bool(flags >> bit & 1) for bit, flag in enumerate(_FLAGS)}
            launches.append(CompiledLaunch(kernel=kernels[kernel], parts=tuple(places), **launch_flags))
        texts = {name: str(graph.get(name, "")) for name in ("problem", "key")}
        graphs.append(
            CompiledGraph(parts=parts, launches=tuple(launches), backward=bool(graph["backward"]), **texts)
        )
    return tuple(graphs)


def _place(value: object) -> Place:
    if value not in get_args(Place):
        raise ValueError(f"expected one of {get_args(Place)}, found {value!r}")
    return value  # type: ignore[return-value]
