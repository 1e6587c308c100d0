"""Every private name of torch that moe_trace uses, each with a public fallback or a reported loss.

A nightly build may lack any of them. When a tracer starts, one line reports what is lost with a missing name
(`missing`), and everything else is recorded; no missing name is an ImportError.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_missing: dict[str, str] = {}
_warned: list[bool] = []


def missing() -> list[str]:
    """Return a sentence for each feature that the installed torch does not support."""
    return [f"torch {torch.__version__} has no {name}: {loss}" for name, loss in _missing.items()]


def warn_of_missing() -> None:
    """Warn of missing features, once per process."""
    if _missing and not _warned:
        _warned.append(True)
        warnings.warn("; ".join(missing()), RuntimeWarning, stacklevel=3)


def _named(name: str, loss: str | None = None) -> Any:
    """Return the object of that name in `torch`, or None; a missing one is reported if `loss` is given."""
    holder, _, last = f"torch.{name}".rpartition(".")
    try:
        found = getattr(pkgutil.resolve_name(holder), last, None)
    except (ImportError, AttributeError):
        found = None
    if found is None and loss is not None:
        _missing[f"torch.{name}"] = loss
    return found


# -- autograd ------------------------------------------------------------------------------------------------

graph_task_id: Callable[[], int] = _named(
    "_C._current_graph_task_id",
    "calls that gradient checkpointing repeats are counted as calls of a forward",
) or (lambda: -1)
"""Id of the backward that the calling thread is in, such as when gradient checkpointing recomputes a forward;
-1 outside a backward."""


_queue_callback = _named("autograd.Variable._execution_engine.queue_callback")


def after_backward(callback: Callable[[], None]) -> bool:
    """Call `callback` when the backward in progress ends; return False if that is not supported."""
    if _queue_callback is None:
        return False
    _queue_callback(callback)
    return True


# -- modes ---------------------------------------------------------------------------------------------------

_modes: Callable[[], list[Any]] = _named("utils._python_dispatch._get_current_dispatch_mode_stack") or list
_no_modes: Callable[[], AbstractContextManager[Any]] | None = _named(
    "utils._python_dispatch._disable_current_modes"
)


def outside_modes() -> AbstractContextManager[Any]:
    """Return a context hidden from the user's dispatch modes, such as a selective checkpointing policy.

    Under a fake tensor mode, modes stay active. Without torch's private names, the modes see the operations
    inside the context.
    """
    modes = _modes()
    if not modes or any(type(mode).__name__ == "FakeTensorMode" for mode in modes):
        return nullcontext()
    return (_no_modes or nullcontext)()


outside_functions: Callable[[], AbstractContextManager[Any]] = (
    _named("_C.DisableTorchFunction") or nullcontext
)
"""Context hidden from modes and subclasses that override torch functions, such as a default device."""
count_function_modes: Callable[[], int] = _named("_C._len_torch_function_stack") or (lambda: 0)
"""Number of active modes of the user that intercept torch functions, including attributes of tensors."""
tracing_state: Callable[[], Any] = _named("_C._get_tracing_state") or (lambda: None)
"""Returns not None while `torch.jit.trace` traces the calling thread."""


# -- the profiler --------------------------------------------------------------------------------------------

_thread_is_profiled: Callable[[], bool] | None = _named("_C._autograd._profiler_enabled") or _named(
    "autograd._profiler_enabled"
)
_profiler = torch.autograd.profiler
if _thread_is_profiled is None and not hasattr(_profiler, "_is_profiler_enabled"):
    _missing["torch._C._autograd._profiler_enabled"] = (
        "whether a profiler records is not known, so no ranges are opened and no call has a place in a trace"
    )


def process_is_profiled() -> bool:
    """Return whether a torch profiler records any thread of this process."""
    return bool(getattr(_profiler, "_is_profiler_enabled", False))


thread_is_profiled: Callable[[], bool] = _thread_is_profiled or process_is_profiled
"""Whether a torch profiler records the calling thread."""


def any_thread_is_profiled() -> bool:
    """Return whether a torch profiler records any thread of this process, or the calling thread."""
    return getattr(_profiler, "_is_profiler_enabled", False) or thread_is_profiled()


def profiles_all_threads(config: Any) -> bool:
    """Return whether a profiler's `experimental_config`, readable by its pickle only, selects all threads."""
    make = _named("_C._profiler._ExperimentalConfig")
    try:
        default, all_threads = (tuple(make(profile_all_threads=on).__getstate__()) for on in (False, True))
        state = tuple(config.__getstate__())
    except (AttributeError, TypeError):
        return False
    differing = [i for i, (a, b) in enumerate(zip(default, all_threads, strict=True)) if a != b]
    return bool(differing and len(state) == len(default) and state[differing[0]])


_enter = _named("_C._autograd._record_function_with_args_enter")
_leave = _named("_C._autograd._record_function_with_args_exit")


def learns_of_public_ranges_alone(config: Any) -> bool:
    """Return whether an `experimental_config` selects the backend `cupti_monitor`.

    That backend sees ranges in `record_function.__enter__`; others do not appear on the device.
    """
    return "cupti_monitor" in str(getattr(config, "custom_profiler_config", ""))


_record_function = torch.profiler.record_function


def enter_range(name: str, publicly: bool = False) -> Any:
    """Open a range like `record_function`, in a third of its time if torch's private names are available.

    `record_function` goes through two operators and their dispatcher; the names above do not.
    """
    if publicly or _enter is None or _leave is None:
        return _record_function(name).__enter__()
    return _enter(name)


def leave_range(entered: Any) -> None:
    """Close a range that `enter_range` opened."""
    if isinstance(entered, _record_function):
        entered.__exit__(None, None, None)
    else:
        _leave(entered)


enter_private: Any = None if _leave is None else _enter
"""Like `enter_range`, without its checks; None if unavailable. The range ends when its result is no longer
referenced: `_leave` only keeps that alive until it is called, and costs a fifth of the range."""


# -- dynamo and graphs ---------------------------------------------------------------------------------------

EVAL_FRAME = os.path.join(os.path.dirname(torch.__file__), "_dynamo", "eval_frame.py")
"""File whose frames are on the stack in a call of what `torch.compile` returned."""


def skip_in_dynamo(functions: Iterable[Callable[..., Any]]) -> None:
    """Keep Dynamo from compiling these functions as separate graphs, which would only be slower. Hooks that
    are inlined into a larger graph are still traced (`torch.compiler.disable` would break that graph)."""
    strategy = _named("_C._dynamo.eval_frame._FrameExecStrategy")
    action = _named("_C._dynamo.eval_frame._FrameAction")
    set_strategy = _named("_C._dynamo.eval_frame.set_code_exec_strategy")
    if strategy is None or action is None or set_strategy is None:
        return
    for function in functions:
        set_strategy(function.__code__, strategy(action.SKIP, action.SKIP))


def may_be_compiled() -> bool:
    """Return whether `torch.compile` was called, or compiled anything before a `torch.compiler.reset`."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    # None is the backend of functions that Dynamo must not compile, such as the methods of optimizers.
    return any(getattr(frames, "cached_backends", {0: frames}).values()) or frames_compiled() > 0


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing.

    Up to torch 2.11, Dynamo treats `torch.compiler.is_exporting()` as True in everything that it compiles.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def frames_compiled() -> int:
    """Return the number of frames that Dynamo has compiled in this process; 0 if it has no such count."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return int(counters["frames"].get("ok", 0)) if "frames" in counters else 0


def mark_static_address(tensor: Tensor) -> None:
    """Let CUDA graphs write to the tensor in place; without this they may copy it, or not be created."""
    mark = _named("_dynamo.mark_static_address")
    if mark is not None:
        mark(tensor)


def without_fake_tensors() -> AbstractContextManager[Any] | None:
    """Return a context with real tensors while a compiler traces with fake ones; None if unavailable."""
    return None if _no_fakes is None else _no_fakes()


_no_fakes: Callable[[], AbstractContextManager[Any]] | None = (
    _named("_subclasses.fake_tensor.unset_fake_temporarily") or _no_modes
)
CAN_RECORD_GRAPHS = _no_fakes is not None
if not CAN_RECORD_GRAPHS:
    _missing["torch._subclasses.fake_tensor.unset_fake_temporarily"] = (
        "what is decided inside compiled code is not recorded"
    )


def kernel_annotations() -> Mapping[int, Sequence[Any]]:
    """Return the annotations of nodes of captured graphs, by node id; empty if torch has none."""
    read = _named("cuda._graph_annotations.get_kernel_annotations")
    return {} if read is None else read()


def mark_kernels(annotation: dict[str, Any]) -> AbstractContextManager[Any] | None:
    """Return a context that annotates nodes added to a capture, but not a backward's; None if disabled."""
    mark = _named("cuda._graph_annotations.mark_kernels")
    if mark is None or not _named("cuda._graph_annotations._annotations_enabled"):
        return None
    # From 2.14 on, kernels of the backward are annotated too, unless disabled.
    forward_only = "backward" in inspect.signature(mark).parameters
    scope: AbstractContextManager[Any] = mark(annotation, **({"backward": False} if forward_only else {}))
    return scope


# -- devices -------------------------------------------------------------------------------------------------

_raw_stream = _named("_C._cuda_getCurrentRawStream")


def current_stream_handle(device: torch.device) -> int:
    """Return the handle of `torch.cuda.current_stream`, in a fifth of its time."""
    if _raw_stream is None:
        return torch.cuda.current_stream(device).cuda_stream
    return int(_raw_stream(device.index))


# -- hooks ---------------------------------------------------------------------------------------------------

stream_is_captured = _named("_C._cuda_isCurrentStreamCapturing") or torch.cuda.is_current_stream_capturing
"""Whether the current stream is captured, once CUDA is initialized; saves two calls in each router call."""
_HOOKS = "_forward_hooks"
if not hasattr(nn.Module(), _HOOKS):
    _missing[f"torch.nn.Module.{_HOOKS}"] = (
        "a hook that is put on a router while it is traced, and changes what the router returns, is not seen"
    )


def hooks_of(module: nn.Module) -> Collection[int]:
    """Return the live collection of a module's forward hooks."""
    hooks: Collection[int] = getattr(module, _HOOKS, ())
    return hooks


def shares_hooks(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules share one dict of hooks, like a shallow copy and its original."""
    hooks = getattr(module, _HOOKS, None)
    if hooks is not None:
        return hooks is getattr(other, _HOOKS, None)
    parts, others = ([*m.children(), *m.parameters(recurse=False)] for m in (module, other))
    return len(parts) == len(others) and all(a is b for a, b in zip(parts, others, strict=True))


def remove_hooks(module: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove the forward hooks and pre-hooks of a module that `unwanted` selects, without their handles."""
    names = ("_forward_pre_hooks", _HOOKS)
    extra = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    for hooks in (getattr(module, name, {}) for name in names):
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            del hooks[key]
            for name in extra:
                getattr(module, name, {}).pop(key, None)
