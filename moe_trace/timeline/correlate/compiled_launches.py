"""Match the kernels of a compiled graph's call to its launches, as a whole sequence and name by name.

A generated kernel has the name and position that the compiler gave it; kernels between two of them belong to
the library calls between them. Where both sequences agree throughout, every kernel is identified. If they
differ in one place, none is.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any
from weakref import WeakMethod

from moe_trace.data.compiled_graph import CompiledGraph, CompiledLaunch

_GENERATED = ("triton_", "cpp_")
_NO_WORK = ("Memset", "Memcpy")
_LIBRARY_PREFIXES = tuple(
    f"torch.ops.{name}." for name in ("aten", "inductor", "mkl", "mkldnn", "onednn", "quantized")
)
"""Prefixes of torch's own operators, which are written in C++."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive kernels and their launches: one launch, or several library calls."""

    kernels: range
    launches: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Fit:
    """A graph whose launches match a sequence of kernels."""

    graph: CompiledGraph
    names: tuple[str, ...]
    """Names of the kernels; the same in most calls of a graph."""
    stretches: Sequence[Stretch]


class LaunchMatcher:
    """Matches the kernels of each call to launches, using all calls of a trace.

    Args:
        every: method that returns the fits of all calls; its object keeps the matcher.
        on_device: whether to match kernels of a GPU; else operators of a CPU, one by one.
    """

    def __init__(
        self, graphs: Iterable[CompiledGraph], every: Callable[[], Iterable[Fit]], *, on_device: bool = True
    ) -> None:
        self._graphs, self._on_device = list(graphs), on_device
        self._every = WeakMethod(every)  # a cycle would keep all events until a garbage collection
        self._fits: dict[tuple[str, ...], list[Fit]] = {}
        self._launches: dict[Fit, Sequence[tuple[Stretch, CompiledLaunch]]] = {}

    def fits(self, names: tuple[str, ...]) -> list[Fit]:
        """Return the graphs that a call may belong to, by the names of its kernels."""
        if names not in self._fits:
            match = match_kernels if self._on_device else match_operators
            found = ((graph, match(names, graph)) for graph in self._graphs)
            self._fits[names] = [
                Fit(graph, names, stretches) for graph, stretches in found if stretches is not None
            ]
        return self._fits[names]

    def is_usual(self, fit: Fit) -> bool:
        """Return whether these are the kernels that the graph usually runs."""
        return not self._on_device or self._usual_names[fit.graph] == fit.names

    def launches(self, fit: Fit) -> Sequence[tuple[Stretch, CompiledLaunch]]:
        """Return the launch of each stretch of kernels; empty if one of them is unknown."""
        if fit not in self._launches:
            known = fit.stretches if self.is_usual(fit) else ()
            parts = (split(fit.names, stretch, fit.graph, self._lengths) for stretch in known)
            found = [(stretch, part_of(stretch, fit.graph)) for stretch in chain.from_iterable(parts)]
            known_launches = [(stretch, launch) for stretch, launch in found if launch is not None]
            self._launches[fit] = known_launches if len(known_launches) == len(found) else ()
        return self._launches[fit]

    def _all_fits(self) -> Iterable[Fit]:
        every = self._every()
        assert every is not None
        return every()

    @cached_property
    def _usual_names(self) -> dict[CompiledGraph, tuple[str, ...] | None]:
        return usual_sequences((fit.graph, fit.names) for fit in self._all_fits())

    @cached_property
    def _lengths(self) -> dict[str, set[int]]:
        return lengths_of_calls({*self._all_fits()})


def match_kernels(names: Sequence[str], graph: CompiledGraph) -> list[Stretch] | None:
    """Return the launches of a GPU's kernels; None if they do not match, or differ between equal calls."""
    stretches = match_launches(names, graph)
    return stretches if stretches is not None and is_consistent(names, stretches, graph) else None


def match_launches(names: Sequence[str], graph: CompiledGraph) -> list[Stretch] | None:
    """Return the launches of the kernels of one call of a compiled graph; None if they do not match.

    Args:
        names: kernels, copies and memsets that the call launched, in the order of the stream.
    """
    if graph.problem:
        return None
    found: list[Stretch] = []
    position, waiting = 0, []  # library calls since the last generated kernel
    for number, launch in enumerate(graph.launches):
        if not launch.generated:
            waiting.append(number)
            continue
        stop = next((i for i in range(position, len(names)) if names[i].startswith(_GENERATED)), len(names))
        if stop == len(names) or names[stop] != launch.kernel:
            return None
        if not _assign_kernels(names, range(position, stop), waiting, found):
            return None
        found.append(Stretch(range(stop, stop + 1), (number,)))
        position, waiting = stop + 1, []
    if any(name.startswith(_GENERATED) for name in names[position:]):
        return None
    return found if _assign_kernels(names, range(position, len(names)), waiting, found) else None


def _assign_kernels(names: Sequence[str], kernels: range, launches: list[int], found: list[Stretch]) -> bool:
    """Assign kernels between two generated ones to the library calls there, each with at least one."""
    working = sum(not names[i].startswith(_NO_WORK) for i in kernels)
    if working < len(launches) or (working and not launches):
        return False
    if launches:
        found.append(Stretch(kernels, tuple(launches)))
    return True


def match_operators(names: Sequence[str], graph: CompiledGraph) -> list[Stretch] | None:
    """Return the launches of a CPU's operators; each launch is one operator with its name.

    Since torch 2.14, for an operator written in Python the profiler shows only the operators that it calls,
    as many as its data require. They are assigned to it if it is the only such operator between the same
    generated kernels.
    """
    operators, found = {_bare_name(name) for name in names}, list[Stretch]()
    for stretch in match_launches(names, graph) or ():
        calls = [graph.launches[number].kernel for number in stretch.launches]
        hidden = [i for i, call in enumerate(calls) if _is_custom(call) and _bare_name(call) not in operators]
        surplus = len(stretch.kernels) - len(calls)
        if surplus and len(hidden) != 1:
            return None
        start = stretch.kernels.start
        for i, number in enumerate(stretch.launches):
            stop = start + 1 + (surplus if i in hidden else 0)
            if i not in hidden and _bare_name(names[start]) != _bare_name(calls[i]):
                return None
            found.append(Stretch(range(start, stop), (number,)))
            start = stop
    return found or None


def _is_custom(call: str) -> bool:
    return call.startswith("torch.ops.") and not call.startswith(_LIBRARY_PREFIXES)


def _bare_name(operator: str) -> str:
    """Return `topk` of `aten::topk` and `torch.ops.aten.topk.default`, `addmm` of
    `extern_kernels.bias_addmm`."""
    parts = re.split(r"::|\.", operator.removeprefix("torch.ops."))
    return parts[1].removeprefix("bias_").strip("_") if len(parts) > 1 else operator


def lengths_of_calls(fits: Iterable[Fit]) -> dict[str, set[int]]:
    """Return the kernel counts of library calls by operator, from calls alone or among equal calls."""
    found: dict[str, set[int]] = defaultdict(set)
    for fit in fits:
        for stretch in fit.stretches:
            launches = [fit.graph.launches[number] for number in stretch.launches]
            working = sum(not fit.names[i].startswith(_NO_WORK) for i in stretch.kernels)
            kernels_each, remainder = divmod(working, len(launches))
            if (
                len({launch.kernel for launch in launches}) == 1
                and not remainder
                and not launches[0].generated
            ):
                found[launches[0].kernel].add(kernels_each)
    return found


def split(
    names: Sequence[str], stretch: Stretch, graph: CompiledGraph, lengths: Mapping[str, set[int]]
) -> list[Stretch]:
    """Split a stretch into its calls if the number of kernels of each is known; else return it whole.

    Args:
        lengths: numbers of kernels that its calls run elsewhere, by operator.
    """
    launches = [graph.launches[number] for number in stretch.launches]
    if len({replace(launch, kernel="") for launch in launches}) == 1:
        return [stretch]
    working = [i for i in stretch.kernels if not names[i].startswith(_NO_WORK)]
    least = [min(lengths.get(launch.kernel, {0})) for launch in launches]
    # If the total is the sum of the minima, each call runs its minimum.
    if not all(least) or sum(least) != len(working):
        if len(launches) != len(working) or part_of(stretch, graph) is None:
            return [stretch]
        least = [1] * len(launches)  # all compute the same part, whichever runs more
    found, assigned, start = [], 0, stretch.kernels.start
    for number, count in zip(stretch.launches, least, strict=True):
        assigned += count
        stop = stretch.kernels.stop if assigned == len(working) else working[assigned - 1] + 1
        found.append(Stretch(range(start, stop), (number,)))
        start = stop
    return found


def part_of(stretch: Stretch, graph: CompiledGraph) -> CompiledLaunch | None:
    """Return a launch that represents a whole stretch; None if it computes different parts of the model."""
    launches = [graph.launches[number] for number in stretch.launches]
    if len({(launch.parts, launch.outside) for launch in launches}) > 1:
        return None
    return replace(
        launches[0],
        product=any(launch.product for launch in launches),
        gather=any(launch.gather for launch in launches),
        write=any(launch.write for launch in launches),
    )


def usual_sequences(
    found: Iterable[tuple[CompiledGraph, Sequence[str]]],
) -> dict[CompiledGraph, tuple[str, ...] | None]:
    """Return the kernels of more than half of each graph's calls; None if there is no such majority.

    A graph runs the same kernels in each call, so kernels that run alongside one call are not in the others.
    """
    counts: dict[CompiledGraph, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for graph, names in found:
        counts[graph][tuple(names)] += 1
    usual = {}
    for graph, sequences in counts.items():
        names, count = sequences.most_common(1)[0]
        usual[graph] = names if 2 * count > sequences.total() else None
    return usual


def is_consistent(names: Sequence[str], stretches: Sequence[Stretch], graph: CompiledGraph) -> bool:
    """Return whether library calls run the same kernels wherever they are between the same generated ones.

    Layers repeat, so this detects a surplus or missing kernel that the libraries' names do not reveal.
    """
    seen: dict[tuple[Any, ...], tuple[str, ...]] = {}
    around = [(), *((graph.launches[stretch.launches[0]].kernel,) for stretch in stretches), ()]
    for number, stretch in enumerate(stretches):
        if graph.launches[stretch.launches[0]].generated:
            continue
        calls = tuple(graph.launches[n].kernel for n in stretch.launches)
        kernels = tuple(names[i] for i in stretch.kernels)
        if seen.setdefault((around[number], calls, around[number + 2]), kernels) != kernels:
            return False
    return True
