"""Open and close `record_function` ranges, so that none can stay open.

A range costs microseconds even when nobody records, so one is opened only while a profiler is recording.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_all_threads = weakref.WeakSet[object]()  # profilers that record every thread


def profiler_is_recording() -> bool:
    """Whether a torch profiler records the calling thread now."""
    if torch._C._autograd._profiler_enabled():
        return True
    # A profiler of all threads is on for none of them in particular, not even for the one that started it.
    return bool(_all_threads) and bool(torch.autograd.profiler._is_profiler_enabled)


def note_profiler(prof: object) -> None:
    """Learn from a profiler's configuration whether it records every thread."""
    state = _config_state(getattr(prof, "experimental_config", None))
    default, all_threads = (
        _config_state(torch._C._profiler._ExperimentalConfig(profile_all_threads=on)) for on in (False, True)
    )
    where = [i for i, (a, b) in enumerate(zip(default, all_threads, strict=True)) if a != b]
    if where and len(state) == len(default) and state[where[0]]:
        _all_threads.add(prof)


def _config_state(config: Any) -> tuple[Any, ...]:
    """The configuration has no readable fields; its pickled state has."""
    try:
        return tuple(config.__getstate__())
    except (AttributeError, TypeError):
        return ()


def _enter_publicly(name: str) -> Any:
    entered = torch.profiler.record_function(name)
    entered.__enter__()
    return entered


def _leave_publicly(entered: Any) -> None:
    entered.__exit__(None, None, None)


# A range of the kind that `record_function` opens, for a third of its time: that one goes through two
# operators and their dispatcher, this one does not. It is private, so the public way stands behind it.
_enter: Callable[[str], Any] = _enter_publicly
_leave: Callable[[Any], None] = _leave_publicly
if hasattr(torch._C._autograd, "_record_function_with_args_enter"):
    _enter = torch._C._autograd._record_function_with_args_enter
    _leave = torch._C._autograd._record_function_with_args_exit


class OpenRanges:
    """The ranges that one tracer has open, per thread, innermost last."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[tuple[str, Any]]] = {}
        """By thread; empty while no range is open, which is cheap to ask."""

    def open(self, name: str) -> None:
        """Open a range on the calling thread."""
        opened = (name, _enter(name))
        thread = threading.get_ident()
        stack = self.stacks.get(thread)
        if stack is None:
            self.stacks[thread] = [opened]
        else:
            stack.append(opened)

    def close(self, name: str) -> None:
        """Close the innermost open range of that name, and any that was left open inside it."""
        thread = threading.get_ident()
        stack = self.stacks.get(thread)
        if not stack or (stack[-1][0] != name and all(name != opened for opened, _ in stack)):
            return
        innermost = None
        while innermost != name:
            innermost, entry = stack.pop()
            _leave(entry)
        if not stack:
            self.stacks.pop(thread, None)

    def close_thread(self) -> None:
        """Close what an interrupted forward left open on the calling thread."""
        for _, entry in reversed(self.stacks.pop(threading.get_ident(), [])):
            _leave(entry)

    def close_all(self) -> None:
        """Close everything, whichever thread opened it."""
        while self.stacks:
            _, stack = self.stacks.popitem()
            for _, entry in reversed(stack):
                _leave(entry)

    def __len__(self) -> int:
        return sum(map(len, self.stacks.values()))


# Two tracers on one model would open every range twice; the first to come opens them.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def claim_ranges(router: nn.Module, tracer: object) -> None:
    """Make `tracer` the one that opens this router's ranges, unless another active one does."""
    owner = _owners.get(router)
    if owner is None or owner() is None:
        _owners[router] = weakref.ref(tracer)


def owns_ranges(router: nn.Module, tracer: object) -> bool:
    """Whether `tracer` opens this router's ranges; it does from now on if no active tracer does."""
    owner = _owners.get(router)
    held_by = None if owner is None else owner()
    if held_by is None:
        claim_ranges(router, tracer)
        return True
    return held_by is tracer


def release_ranges(router: nn.Module, tracer: object) -> None:
    """Give up the claim, if it is this tracer's."""
    owner = _owners.get(router)
    if owner is not None and owner() is tracer:
        del _owners[router]
