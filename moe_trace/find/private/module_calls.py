"""Inspection of module calls in progress through Python's call stack."""

from __future__ import annotations

import sys

from torch import nn


def raised_before_forward() -> bool:
    """Return whether a pre-hook raised; called in an always-called forward hook that received no output.

    torch calls such a hook while it handles the exception, and binds the local `bw_hook` after the last
    pre-hook. If that local has another name in a torch version, the forward is assumed to have begun.
    """
    error = sys.exc_info()[1]
    trace = None if error is None else error.__traceback__
    callers = sys._getframe(2), sys._getframe(3)  # callers of the hook, which another hook may have called
    if trace is None or trace.tb_frame not in callers or trace.tb_next is None:
        return False
    inside = trace.tb_next.tb_frame
    return "bw_hook" in inside.f_code.co_varnames and "bw_hook" not in inside.f_locals


def is_inside(module: nn.Module) -> bool:
    """Return whether the calling thread is inside another call of a module; called in one of its hooks."""
    frame, calls, code = sys._getframe(1), 0, nn.Module.__call__.__code__
    while frame is not None and calls < 2:
        calls += frame.f_code is code and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2


def ids_of_hooks(module: nn.Module, *, but_of: type, pre: bool = True) -> tuple[int, ...]:
    """Return the ids of a module's forward hooks but methods of `but_of` instances; ids are never reused.

    Args:
        pre: whether to include forward pre-hooks.
    """
    on = [getattr(module, name, {}) for name in ("_forward_hooks", "_forward_pre_hooks")[: 1 + pre]]
    found = (item for hooks in on for item in hooks.items())
    return tuple(number for number, hook in found if not isinstance(getattr(hook, "__self__", None), but_of))
