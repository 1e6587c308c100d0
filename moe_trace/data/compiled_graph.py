"""What one graph of `torch.compile` launches, and which part of an MoE layer each launch computes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

BY_COMPILER = "by the compiler's provenance"
"""The mark of times that are known by it: by what torch's provenance tracking says of each launch."""
Place = Literal["router", "experts", "block"]
"""Inside the router, inside the experts, or elsewhere in their MoE block."""


@dataclass(frozen=True, kw_only=True)
class LaunchPart:
    """A part of the model that a launch computes."""

    routers: tuple[str, ...]
    """Module paths of the routers of the layer; several where layers share the compiled code, which then runs
    once for each of them."""
    place: Place

    def router(self, number: int, runs: int, among: Container[str]) -> str | None:
        """Whose a run of the graph in a forward is: where layers share the code, one layer's, in their order.

        Args:
            number: which of the graph's `runs` in the forward it is.
            among: the routers that the forward calls.
        """
        routers = [name for name in self.routers if name in among]
        return routers[number] if len(routers) == runs else None


@dataclass(frozen=True, kw_only=True)
class CompiledLaunch:
    """One launch of the generated code: a generated kernel, or a call of a library."""

    kernel: str
    """Name of the generated kernel, as a trace has it; of a library's call, the operator."""
    generated: bool
    """Whether it is one kernel of that name; a library's call runs any number of kernels of any names."""
    parts: tuple[int, ...] = ()
    """Places in `CompiledGraph.parts`; empty for the rest of the model, several where it was fused."""
    outside: bool = False
    """Whether it computes something of the rest of the model as well."""
    product: bool = False
    """Whether it is, or holds, a matrix product."""
    gather: bool = False
    """Whether it gathers rows."""
    write: bool = False
    """Whether it writes rows back."""


@dataclass(frozen=True, kw_only=True)
class CompiledGraph:
    """The launches of one graph in the order of its generated code, by the compiler's provenance."""

    parts: tuple[LaunchPart, ...]
    launches: tuple[CompiledLaunch, ...]
    """Empty where there is a problem."""
    backward: bool = False
    problem: str = ""
    """Why its launches are not known, with what helps."""
    key: str = ""
    """Of the graph in Inductor's cache, as a trace shows it of each call; empty where it is not known."""


_FLAGS = ("generated", "outside", "product", "gather", "write")
_VERSIONS = (1, 2)
"""The first has no problems; the last is written."""


def encode_compiled(graphs: Sequence[CompiledGraph]) -> dict[str, Any]:
    """As JSON: each kernel's name once; a launch is its place among them, its flags as bits, its parts."""
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
        one = {"parts": parts, "launches": launches, "backward": graph.backward}
        told = {"problem": graph.problem, "key": graph.key}
        encoded.append(one | {name: text for name, text in told.items() if text})
    return {"version": _VERSIONS[-1], "kernels": [*kernels], "graphs": encoded}


def decode_compiled(value: Any) -> tuple[CompiledGraph, ...]:
    """The inverse; empty for None, and for a later version, whose meaning is not known.

    Raises:
        ValueError, TypeError, LookupError: no such JSON.
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
            told = {flag: bool(flags >> bit & 1) for bit, flag in enumerate(_FLAGS)}
            launches.append(CompiledLaunch(kernel=kernels[kernel], parts=tuple(places), **told))
        texts = {name: str(graph.get(name, "")) for name in ("problem", "key")}
        graphs.append(
            CompiledGraph(parts=parts, launches=tuple(launches), backward=bool(graph["backward"]), **texts)
        )
    return tuple(graphs)


def _place(value: object) -> Place:
    if value not in get_args(Place):
        raise ValueError(f"expected one of {get_args(Place)}, found {value!r}")
    return value  # type: ignore[return-value]
