"""Open and close `record_function` ranges, so that none can stay open.

A range costs microseconds even when nobody records, so one is opened only while a profiler is recording.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

from moe_trace.find.private.torch_names import (
    enter_range,
    learns_of_public_ranges_alone,
    leave_range,
    process_is_profiled,
    profiles_all_threads,
    thread_is_profiled,
)

_all_threads = weakref.WeakSet[object]()  # profilers that record every thread
_public_alone = weakref.WeakSet[object]()  # profilers that must be told of a range by `record_function`


def any_profiler_is_recording() -> bool:
    """Whether a torch profiler records in this process, be it other threads only."""
    return process_is_profiled() or thread_is_profiled()


def profiler_is_recording() -> bool:
    """Whether a torch profiler records the calling thread now."""
    if thread_is_profiled():
        return True
    # A profiler of all threads is on for none of them in particular, not even for the one that started it.
    return bool(_all_threads) and process_is_profiled()


def note_profiler(prof: object) -> None:
    """Learn from a profiler's configuration whether it records every thread, and how it learns of ranges."""
    config = getattr(prof, "experimental_config", None)
    if profiles_all_threads(config):
        _all_threads.add(prof)
    if learns_of_public_ranges_alone(config):
        _public_alone.add(prof)


class OpenRanges:
    """The ranges that one tracer has open, per thread, innermost last."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[tuple[str, Any]]] = {}
        """By thread; empty while no range is open, which is cheap to ask."""
        self.wanted: bool | None = None
        """Whether a profiler records the forwards under way; None where nobody knows, so it is asked."""
        self.quiet: set[int] = set()
        """Threads whose forward is not recorded."""

    def open(self, name: str) -> None:
        """Open a range on the calling thread, if it is wanted."""
        if not self.wanted and (self.wanted is False or not profiler_is_recording()):
            return
        thread = threading.get_ident()
        if thread in self.quiet:
            return
        opened = (name, enter_range(name, publicly=bool(_public_alone)))
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
            leave_range(entry)
        if not stack:
            self.stacks.pop(thread, None)

    def close_thread(self) -> None:
        """Close what an interrupted forward left open on the calling thread."""
        for _, entry in reversed(self.stacks.pop(threading.get_ident(), [])):
            leave_range(entry)

    def close_all(self) -> None:
        """Close everything, whichever thread opened it."""
        while self.stacks:
            _, stack = self.stacks.popitem()
            for _, entry in reversed(stack):
                leave_range(entry)

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
