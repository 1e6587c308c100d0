"""What Python's own stack tells of the calls of modules under way."""

from __future__ import annotations

import sys

from torch import nn


def raised_before_forward() -> bool:
    """Asked in an always-called forward hook that was given no output: whether a pre-hook had raised.

    torch calls such a hook while it handles the exception; behind the last pre-hook it binds `bw_hook`. A
    torch in which that has another name is taken to have begun the forward.
    """
    error = sys.exc_info()[1]
    trace = None if error is None else error.__traceback__
    callers = sys._getframe(2), sys._getframe(3)  # of the hook, which another one may have handed on
    if trace is None or trace.tb_frame not in callers or trace.tb_next is None:
        return False
    inside = trace.tb_next.tb_frame
    return "bw_hook" in inside.f_code.co_varnames and "bw_hook" not in inside.f_locals


def is_inside(module: nn.Module) -> bool:
    """Asked in a hook of a module: whether the calling thread is inside another call of it."""
    frame, calls, code = sys._getframe(1), 0, nn.Module.__call__.__code__
    while frame is not None and calls < 2:
        calls += frame.f_code is code and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2


def ids_of_hooks(module: nn.Module, *, but_of: type, pre: bool = True) -> tuple[int, ...]:
    """Of a module's forward hooks that are no methods of objects of a class; no id is ever used again.

    Args:
        pre: its forward pre-hooks too.
    """
    on = [getattr(module, name, {}) for name in ("_forward_hooks", "_forward_pre_hooks")[: 1 + pre]]
    found = (item for hooks in on for item in hooks.items())
    return tuple(number for number, hook in found if not isinstance(getattr(hook, "__self__", None), but_of))
