"""Access to Inductor's provenance, which shows the part of a model that each generated kernel computes.

While generating code, Inductor records which nodes of its graph each launch computes
(`trace.provenance_tracking_level`), and each node has the modules that it was traced in. Code loaded from
Inductor's cache on disk contains the notes that a tracer stored there when it was compiled. All of this is
private API: if a name is missing, or anything fails, there are no notes and the user's compilation continues.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moe_trace.find.private.generated_code import problem_of
from moe_trace.find.private.launch_notes import (
    GraphNode,
    LaunchNodes,
    LaunchNotes,
    Origins,
    decode_notes,
    encode_notes,
)

Told = Callable[[LaunchNotes], None]
"""Callback with the notes of a graph that was compiled, or loaded from the cache."""

_PACKAGE_PATH = f'"{Path(__file__).parents[2]}{os.sep}'
_ADDRESS = re.compile(r"\b0x[0-9a-f]+")
_OPERATOR = "torch.ops."
_NOTES_ATTRIBUTE, _CALLS_ATTRIBUTE = "moe_trace_launches", "moe_trace_calls"
_NO_KERNEL = ("aten.copy_", "inductor_ops.resize_storage_bytes_")
"""Calls that have a name but no note, and need none."""
_listeners: list[Told] = []
_undo: list[Callable[[], None]] = []
_said: list[bool] = []
_keys: list[str] = []  # key of the graph that is looked up in the cache, until its notes are reported
_origins: WeakKeyDictionary[Any, Origins | None] = WeakKeyDictionary()


def listen_to_compiles(told: Told) -> bool:
    """Call `told` for every graph that Inductor compiles, until `stop_listening`.

    The first listener enables Inductor's provenance, which costs compile time; without listeners it is as set
    by the user. Returns False if this torch version has no provenance.
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
        while _undo and not _listeners:
            _undo.pop()()


@contextmanager
def _warn_once() -> Iterator[None]:
    """Turn errors into one warning per process, since they must not break the user's compilation."""
    try:
        yield
    except Exception as error:
        if not _said:
            _said.append(True)
            warnings.warn(
                f"the compiler's provenance could not be read ({type(error).__name__}: {error}); the code "
                "runs and is recorded, but reports do not tell its phases",
                RuntimeWarning,
                stacklevel=4,
            )


def _switch_on() -> bool:
    try:
        from torch._inductor import config, debug
        from torch._inductor.graph import GraphLowering
        from torch._inductor.scheduler import Scheduler

        level, kernels_of = config.trace.provenance_tracking_level, debug.create_kernel_information_json
        _number_of_call(debug)
        _wrap(Scheduler, "codegen_extern_call", before=partial(_number_of_call, debug), after=_note_call)
        # The notes of a backward that is compiled when it first runs remain in the table for the next graph.
        _wrap(GraphLowering, "compile_to_module", before=lambda *_: {*kernels_of()}, after=_note_graph)
    except (ImportError, AttributeError):
        while _undo:
            _undo.pop()()
        return False
    config.trace.provenance_tracking_level = max(1, level)
    _undo.append(lambda: setattr(config.trace, "provenance_tracking_level", level))
    with suppress(ImportError, AttributeError):  # without these names, code from the cache has no notes
        from torch._inductor import codecache, compile_fx
        from torch._inductor.output_code import CompiledFxGraph

        _wrap(codecache.FxGraphCache, "load_with_key", before=_store_key)
        _wrap(compile_fx, "compile_fx", before=_store_origins)
        _wrap(CompiledFxGraph, "after_deserialization", after=_notify_loaded)
        _wrap(CompiledFxGraph, "__init__", after=_keep)
    return True


def _wrap(
    owner: Any, name: str, before: Callable[..., Any] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Wrap a function of torch with callbacks whose errors do not propagate.

    Args:
        before: called with the function's arguments.
        after: called with the result of `before`, the function's result, and its arguments.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        before_result = None
        if before is not None:
            with _warn_once():
                before_result = before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            with _warn_once():
                after(before_result, result, *args, **kwargs)
        return result

    def undo() -> None:
        if getattr(owner, name) is replacement:
            setattr(owner, name, original)

    setattr(owner, name, replacement)
    _undo.append(undo)


def _note_graph(earlier: set[str], module: Any, lowering: Any) -> None:
    """Report the notes of a graph whose code was generated and loaded."""
    from torch._inductor import debug

    kernels = debug.create_kernel_information_json()
    found = {name: note for name, note in kernels.items() if name not in earlier}
    notes = _notes(
        lowering, _launches(found, vars(lowering).get(_CALLS_ATTRIBUTE, {})), Path(module.__file__)
    )
    if origins := _current_origins():
        setattr(lowering, _NOTES_ATTRIBUTE, encode_notes(notes, origins))
    _notify(notes)


def _number_of_call(debug: Any, *_: Any) -> int:
    """Return the number of the last launch with a note."""
    return int(debug._inductor_kernel_provenance_debug_handle)


def _note_call(before: int, _: Any, scheduler: Any, scheduler_node: Any) -> None:
    """Complete the note of a generated library call: some have none, or list more nodes than they compute."""
    from torch._inductor import debug

    call = scheduler_node.node
    name = getattr(call, "python_kernel_name", None)
    if name and name not in _NO_KERNEL:
        if _number_of_call(debug) == before:
            debug.set_kernel_post_grad_provenance_tracing(call, name, is_extern=True)
        if _number_of_call(debug) == before + 1 and call.origins:
            calls = vars(torch._inductor.virtualized.V.graph).setdefault(_CALLS_ATTRIBUTE, {})
            exact = call.origin_node if call.origin_node in call.origins else max(call.origins)
            calls[before + 1] = exact.name


def _notes(lowering: Any, launches: tuple[LaunchNodes, ...], path: Path) -> LaunchNotes:
    """Return the notes of a compiled graph, verified against the code at `path`."""
    graph = lowering.module.graph
    idle = {node.name for node in graph.nodes if _is_idle(node)}
    problem = problem_of(path.read_text(), [launch.kernel for launch in launches])
    nodes = graph.nodes if not problem else _all_nodes(lowering.module)
    return LaunchNotes(
        tuple(
            launch
            for launch in launches
            if not (launch.kernel.startswith(_OPERATOR) and idle >= {*launch.nodes})
        ),
        tuple(map(_node, nodes)),
        bool(getattr(lowering, "is_backward", False)),
        problem,
    )


def _all_nodes(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Return all nodes, including those of regions and branches."""
    parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    return [node for part in parts for node in part.graph.nodes]


def _keep(_: None, result: None, graph: Any, *args: Any, **kwargs: Any) -> None:
    """Store the notes in the object that Inductor puts into its cache."""
    for value in (*args, *kwargs.values()):
        if isinstance(encoded := getattr(value, _NOTES_ATTRIBUTE, None), bytes):
            setattr(graph, _NOTES_ATTRIBUTE, encoded)


def _notify_loaded(_: None, path: Any, graph: Any, *args: Any, **kwargs: Any) -> None:
    """Report the notes of code that was loaded from the cache."""
    origins = _current_origins()
    notes = decode_notes(getattr(graph, _NOTES_ATTRIBUTE, None), origins) if origins else None
    if notes is not None:
        _notify(notes)


def _store_origins(*args: Any, **kwargs: Any) -> None:
    """Keep the origins of a traced graph before it is compiled or its code is loaded from the cache."""
    context = torch._guards.TracingContext.try_get()
    graph = next(
        (value for value in (*args, *kwargs.values()) if isinstance(value, torch.fx.GraphModule)), None
    )
    if context is not None and graph is not None:
        found = _origins_of(graph)
        # If a context has several graphs, a backward cannot be assigned to one of them.
        _origins[context] = found if _origins.get(context, found) == found else None


def _store_key(key: str, *args: Any, **kwargs: Any) -> None:
    """Keep the key of a graph that is looked up in the cache before it is loaded or compiled."""
    _keys[:] = [key]


def _current_origins() -> Origins | None:
    context = torch._guards.TracingContext.try_get()
    return None if context is None else _origins.get(context)


def _origins_of(graph: torch.fx.GraphModule) -> Origins:
    nodes = _all_nodes(graph)
    numbers = {node: f"%{number}" for number, node in enumerate(nodes)}
    code = hashlib.sha256()
    for node in nodes:
        target = "" if node.op == "placeholder" else node.target
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
        code.update(_ADDRESS.sub("", f"{node.op} {target} {arguments}\n").encode())
    known = map(_node, nodes)
    return Origins(code.hexdigest(), tuple((node.modules, node.ours) for node in known))


def _notify(notes: LaunchNotes) -> None:
    notes = replace(notes, key=_keys.pop() if _keys else "")
    for listener in list(_listeners):
        listener(notes)


def _launches(kernels: dict[str, Any], calls: dict[int, str]) -> tuple[LaunchNodes, ...]:
    """Return the launches, sorted by the number in each name, which counts launches of the generated code.

    Args:
        calls: node that each library call computes, by that number.
    """
    found = []
    for name, notes in kernels.items():
        kernel, _, number = name.rpartition(":")
        nodes = [calls[int(number)]] if int(number) in calls else notes["post_grad_nodes"]
        found.append((int(number), LaunchNodes(kernel, tuple(nodes))))
    return tuple(launch for _, launch in sorted(found, key=lambda numbered: numbered[0]))


def _is_idle(node: torch.fx.Node) -> bool:
    """Return whether a node is a view that runs no kernel, as of complex numbers. A CPU's trace shows it."""
    value = node.meta.get("val")
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return is_view and isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _node(node: torch.fx.Node) -> GraphNode:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    modules = tuple(str(entry[0]) for entry in stack.values())
    return GraphNode(
        node.name, str(node.target), modules, _PACKAGE_PATH in str(node.meta.get("stack_trace") or "")
    )
