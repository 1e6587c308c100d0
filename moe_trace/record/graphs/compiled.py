"""Detection of compiled parts of a model, and warnings about code compiled without hooks."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_trace.find.private.torch_names import EVAL_FRAME, frames_compiled

_FIRST_STABLE_ID = 2**40  # torch counts its own hooks from 0


def give_stable_id(handle: RemovableHandle) -> None:
    """Change the id of a hook in its module to the first free one of a few fixed ids.

    Dynamo compiles the ids of hooks into its guards: with torch's running numbers, layers could not share
    their code, and hooks that are removed and registered again would cause a recompilation.
    """
    try:
        dicts = [handle.hooks_dict_ref(), *(ref() for ref in handle.extra_dict_ref)]
    except AttributeError:  # handles of this torch version differ: only compile time is lost
        return
    hooks = dicts[0]
    first = next(iter(hooks), None) == handle.id
    stable = next(i for i in range(_FIRST_STABLE_ID, _FIRST_STABLE_ID + len(hooks) + 1) if i not in hooks)
    for entries in dicts:
        if handle.id in entries:
            entries[stable] = entries.pop(handle.id)
    if first:  # registered with prepend=True
        hooks.move_to_end(stable, last=False)
    handle.id = stable


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the paths of the modules that torch.compile was applied to, as far as the modules show it.

    `compiled = torch.compile(model)` leaves `model` unchanged: only `compiled` is recognized.
    """
    return [name or type(model).__name__ for name, module in model.named_modules() if _is_compiled(module)]


def _is_compiled(module: nn.Module) -> bool:
    attributes: dict[str, Any] = module.__dict__
    if attributes.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules:
        return True
    return hasattr(attributes.get("forward"), "_torchdynamo_orig_callable") or hasattr(
        attributes.get("__call__"), "_torchdynamo_orig_callable"
    )


def is_called_through_compile() -> bool:
    """Return whether this thread is inside a call of a compiled function, and may thus compile code now."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == EVAL_FRAME:
            return True
        frame = frame.f_back
    return False


def is_compiled(model: nn.Module, *, first: bool) -> bool:
    """Return whether the forward that begins may run compiled code, or be compiled.

    Args:
        first: whether this is the first forward since the tracer started.
    """
    return (first and bool(compiled_parts(model))) or is_called_through_compile()


def warn_of_silent_forwards(count: int) -> None:
    """Warn that compiled code without hooks ran although other compiled code has them."""
    warnings.warn(
        f"no router call was seen in {count} forwards, and code was compiled in this process: code that was "
        "compiled while the tracer was off, or for another model of the same class, has no hooks in it and "
        "may be used again. Call tracer.recompile() after starting the tracer; where two models of a class "
        "are compiled, set torch._dynamo.config.skip_nnmodule_hook_guards = False before either is",
        RuntimeWarning,
        stacklevel=4,
    )


def warn_if_compiled_before(model: nn.Module, *, called: bool) -> None:
    """Warn that hooks registered after the first compiled call are not part of the compiled code."""
    if called or not frames_compiled():
        return
    parts = compiled_parts(model)
    cause = f"{parts[0]} is compiled" if parts else "compiled code ran in this process"
    warnings.warn(
        f"no router call of {type(model).__name__} was recorded, and {cause}: code that was compiled "
        "before the tracer was on has no hooks in it. Start the tracer before the first compiled call, or "
        "call tracer.recompile() after starting it, and run the model again",
        RuntimeWarning,
        stacklevel=3,
    )
