"""Open and close `record_function` ranges, so that none can stay open.

A range costs microseconds even when nobody records, so one is opened only while a profiler is recording.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from moe_trace.find.private.torch_names import (
    enter_private,
    enter_range,
    learns_of_public_ranges_alone,
    leave_range,
    process_is_profiled,
    profiles_all_threads,
    thread_is_profiled,
)

_all_threads = weakref.WeakSet[object]()  # profilers that record every thread
_public_alone = weakref.WeakSet[object]()  # profilers that must be told of a range by `record_function`


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

    __slots__ = ("in_slots", "own", "quiet", "slots", "stacks", "thread", "wanted")

    def __init__(self) -> None:
        self.stacks: dict[int, list[tuple[str, Any]]] = {}
        """By thread: (name, entry) of each range; empty where nothing can be open, which is cheap to ask."""
        self.wanted: bool | None = None
        """Whether a profiler records the forwards under way; None where nobody knows, so it is asked."""
        self.quiet: set[int] = set()
        """Threads whose forward is not recorded."""
        self.thread = -1
        """Whose profiled forward began last: its ranges are opened without asking."""
        self.slots: dict[str, int] = {}
        self.in_slots: dict[int, list[Any]] = {}
        """By thread whose profiled forward is under way: by slot, what it has open outside its stack, as
        (what was open there before, entry). Such a range ends when nothing refers to it."""
        self.own: list[Any] = []
        """Of `thread`."""

    def slot(self, name: str) -> int:
        """Where a range of that name stands in `own`."""
        return self.slots.setdefault(name, len(self.slots))

    def want(self, thread: int) -> None:
        """A profiler records the forward that the calling thread begins."""
        self.wanted = True
        self.stacks.setdefault(thread, [])
        if enter_private is not None and not _public_alone:
            self.thread, self.own = thread, [None] * len(self.slots)
            self.in_slots[thread] = self.own

    def open(self, name: str, thread: int) -> None:
        """Open a range on the calling thread, if it is wanted."""
        if thread != self.thread:
            if not self.wanted and (self.wanted is False or not profiler_is_recording()):
                return
            if thread in self.quiet:
                return
        entry = enter_range(name, publicly=bool(_public_alone))
        self.stacks.setdefault(thread, []).append((name, entry))

    def close(self, name: str, thread: int) -> None:
        """Close the innermost open range of that name, and any that was left open inside it."""
        stack, own = self.stacks.get(thread, []), self.in_slots.get(thread)
        at = max((at for at, (opened, _) in enumerate(stack) if opened == name), default=None)
        if at is not None:
            self._close(stack[at:])
            del stack[at:]
        elif own and (left := own[slot := self.slots[name]]):
            own[slot] = left[0]
        if not stack and own is None:
            self.stacks.pop(thread, None)

    def has(self, name: str, thread: int) -> bool:
        """Whether a range of that name is open on a thread."""
        return any(opened == name for opened, _ in self.stacks.get(thread, ()))

    def end(self, thread: int) -> None:
        """Close what the calling thread has open: its forward is over, or was interrupted."""
        if thread == self.thread:
            self.thread, self.own = -1, []
        self.in_slots.pop(thread, None)
        left_open = self.stacks.pop(thread, None)
        if left_open:
            self._close(left_open)

    def close_all(self) -> None:
        """Close everything, whichever thread opened it."""
        for thread in list(self.stacks):
            self.end(thread)

    @staticmethod
    def _close(stack: list[tuple[str, Any]]) -> None:
        for _, entry in reversed(stack):
            leave_range(entry)

    def __len__(self) -> int:
        return sum(map(len, self.stacks.values())) + sum(
            entry is not None for own in self.in_slots.values() for entry in own
        )


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
