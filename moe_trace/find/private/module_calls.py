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


def count_hooks(module: nn.Module, but_of: type) -> int:
    """How many forward hooks and pre-hooks a module has that are no methods of objects of a class."""
    both = (getattr(module, name, {}) for name in ("_forward_pre_hooks", "_forward_hooks"))
    return sum(not isinstance(getattr(hook, "__self__", None), but_of) for on in both for hook in on.values())
