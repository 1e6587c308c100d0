"""The private names of torch's compiler that tell which part of a model each generated kernel computes.

Inductor notes, while it generates code, which nodes of its graph each launch computes
(`trace.provenance_tracking_level`), and each node knows the modules that it was traced in. None of it has a
public name; where one is missing, or anything fails, nothing is told and the user's compilation goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GraphNode:
    """An operator of a graph that was compiled."""

    name: str
    target: str
    """As `aten.mm.default`."""
    modules: tuple[str, ...]
    """Paths of the modules that it was traced in, outermost first, such as `L['self'].model.layers.0.mlp`;
    of a backward's operator, those of the forward's."""
    source: str
    """Where it was called from, as a traceback; empty where that is not known."""


@dataclass(frozen=True)
class LaunchNodes:
    """One launch, in the order of the generated code: the kernel's name, and the names of its nodes."""

    kernel: str
    nodes: tuple[str, ...]


Told = Callable[[Sequence[LaunchNodes], Sequence[GraphNode], bool], None]
"""Called with the launches and the nodes of a graph that was compiled, and whether it is a backward."""

_listeners: list[Told] = []
_undo: list[Callable[[], None]] = []
_said: list[bool] = []


def listen_to_compiles(told: Told) -> bool:
    """Have `told` called for every graph that Inductor compiles, until `stop_listening`.

    The first listener switches Inductor's notes on, which cost compile time; without listeners they are as
    the user set them. False where this torch has none.
    """
    if told not in _listeners:
        if not _listeners and not _switch_on():
            return False
        _listeners.append(told)
    return True


def stop_listening(told: Told) -> None:
    """Undo `listen_to_compiles`."""
    if told in _listeners:
        _listeners.remove(told)
        if not _listeners:
            _undo.pop()()


def _say_once(error: Exception) -> None:
    if not _said:
        _said.append(True)
        warnings.warn(
            f"the compiler's notes of its kernels could not be read ({type(error).__name__}: {error}); the "
            "code runs and is recorded, but reports do not tell its phases",
            RuntimeWarning,
            stacklevel=2,
        )


def _switch_on() -> bool:
    try:
        from torch._inductor import config, debug
        from torch._inductor.graph import GraphLowering

        name = "compile_to_module"
        compile_to_module, level = getattr(GraphLowering, name), config.trace.provenance_tracking_level
        kernels_of = debug.create_kernel_information_json
    except (ImportError, AttributeError):
        return False

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A backward that is compiled when it first runs leaves its notes to the next one.
        with suppress(Exception):
            earlier = set(kernels_of())
        module = compile_to_module(self, *args, **kwargs)
        try:
            notes = {name: note for name, note in kernels_of().items() if name not in earlier}
            launches, nodes = _launches(notes), [*map(_node, self.module.graph.nodes)]
            for told in list(_listeners):
                told(launches, nodes, bool(getattr(self, "is_backward", False)))
        except Exception as error:  # the user's compilation is worth more than our notes
            _say_once(error)
        return module

    def undo() -> None:
        config.trace.provenance_tracking_level = level
        if getattr(GraphLowering, name) is compiled:
            setattr(GraphLowering, name, compile_to_module)

    setattr(GraphLowering, name, compiled)
    config.trace.provenance_tracking_level = max(1, level)
    _undo.append(undo)
    return True


def _launches(kernels: dict[str, Any]) -> list[LaunchNodes]:
    """Sorted by the number behind each name, which counts the launches of the generated code."""
    found = []
    for name, notes in kernels.items():
        kernel, _, number = name.rpartition(":")
        found.append((int(number), LaunchNodes(kernel, tuple(notes["post_grad_nodes"]))))
    return [launch for _, launch in sorted(found, key=lambda one: one[0])]


def _node(node: torch.fx.Node) -> GraphNode:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = tuple(str(entry[0]) for entry in stack.values())
    return GraphNode(node.name, str(node.target), paths, str(node.meta.get("stack_trace") or ""))
