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
    """The ranges that one tracer has open, per thread."""

    __slots__ = ("opened", "own", "quiet", "slots", "thread", "wanted")

    def __init__(self) -> None:
        self.opened: dict[int, list[Any]] = {}
        """By thread: by slot, what is open, as (what was open there before, entry). Empty where nothing can
        be open, which is cheap to ask."""
        self.wanted: bool | None = None
        """Whether a profiler records the forwards under way; None where nobody knows, so it is asked."""
        self.quiet: set[int] = set()
        """Threads whose forward is not recorded."""
        self.thread = -1
        """Whose profiled forward began last: its ranges are opened without asking."""
        self.own: list[Any] = []
        """What is open on `thread`. Such a range ends when nothing refers to its entry."""
        self.slots: dict[str, int] = {}

    def slot(self, name: str) -> int:
        """Where a range of that name stands; asked before any is opened."""
        return self.slots.setdefault(name, len(self.slots))

    def want(self, thread: int) -> None:
        """A profiler records the forward that the calling thread begins."""
        self.wanted, own = True, self._on(thread)
        if enter_private is not None and not _public_alone:
            self.thread, self.own = thread, own

    def _on(self, thread: int) -> list[Any]:
        return self.opened.get(thread) or self.opened.setdefault(thread, [None] * len(self.slots))

    def open(self, name: str, thread: int) -> None:
        """Open a range on the calling thread, if it is wanted."""
        if thread != self.thread:
            if not self.wanted and (self.wanted is False or not profiler_is_recording()):
                return
            if thread in self.quiet:
                return
        own, slot = self._on(thread), self.slots[name]
        own[slot] = own[slot], enter_range(name, publicly=bool(_public_alone))

    def close(self, name: str, thread: int) -> None:
        """Close the innermost open range of that name."""
        own, slot = self.opened.get(thread), self.slots[name]
        if own and own[slot]:
            own[slot], entry = own[slot]
            leave_range(entry)
            if own is not self.own and not any(own):
                del self.opened[thread]

    def has(self, name: str, thread: int) -> bool:
        """Whether a range of that name is open on a thread."""
        own = self.opened.get(thread)
        return bool(own and own[self.slots[name]])

    def end(self, thread: int) -> None:
        """Close what a thread has open: its forward is over, or was interrupted."""
        if thread == self.thread:
            self.thread, self.own = -1, []
        own = self.opened.pop(thread, [])
        for left_open in own if own.count(None) < len(own) else ():
            while left_open:
                left_open, entry = left_open
                leave_range(entry)

    def __len__(self) -> int:
        return sum(one is not None for own in self.opened.values() for one in own)


# Two tracers on one model would open every range twice; the first to come opens them.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def claim_ranges(router: nn.Module, tracer: object) -> bool:
    """Whether `tracer` opens this router's ranges; it does from now on if no active tracer does."""
    owner = _owners.get(router)
    held_by = None if owner is None else owner()
    if held_by is None:
        _owners[router] = weakref.ref(tracer)
    return held_by is None or held_by is tracer


def release_ranges(router: nn.Module, tracer: object) -> None:
    """Give up the claim, if it is this tracer's."""
    owner = _owners.get(router)
    if owner is not None and owner() is tracer:
        del _owners[router]
