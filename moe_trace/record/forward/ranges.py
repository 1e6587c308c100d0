"""Open and close `record_function` ranges, such that none can stay open.

A range costs microseconds even without a profiler, so ranges are opened only while one records.
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
_public_alone = weakref.WeakSet[object]()  # profilers that see only ranges of `record_function`


def profiler_is_recording() -> bool:
    """Return whether a torch profiler is recording the calling thread."""
    if thread_is_profiled():
        return True
    # A profiler of all threads is not enabled on any single thread, including the one that started it.
    return bool(_all_threads) and process_is_profiled()


def note_profiler(prof: object) -> None:
    """Note whether a profiler records every thread and which ranges it sees, from its configuration."""
    config = getattr(prof, "experimental_config", None)
    if profiles_all_threads(config):
        _all_threads.add(prof)
    if learns_of_public_ranges_alone(config):
        _public_alone.add(prof)


class OpenRanges:
    """The open ranges of one tracer, per thread."""

    __slots__ = ("opened", "own", "quiet", "slots", "thread", "wanted")

    def __init__(self) -> None:
        self.opened: dict[int, list[Any]] = {}
        """Per thread, and per slot, the open range as (range open there before, entry). Empty if nothing can
        be open, which makes the check cheap."""
        self.wanted: bool | None = None
        """Whether a profiler records the current forwards; None if unknown, in which case it is queried."""
        self.quiet: set[int] = set()
        """Threads whose forward is not recorded."""
        self.thread = -1
        """Thread of the profiled forward that began last; its ranges are opened without a query."""
        self.own: list[Any] = []
        """Open ranges of `thread`. Such a range ends when nothing refers to its entry."""
        self.slots: dict[str, int] = {}

    def slot(self, name: str) -> int:
        """Return the slot of a range name; to be called before any range is opened."""
        return self.slots.setdefault(name, len(self.slots))

    def want(self, thread: int) -> None:
        """Open ranges for the forward that the calling thread begins, because a profiler records it."""
        self.wanted, own = True, self._thread_slots(thread)
        if enter_private is not None and not _public_alone:
            self.thread, self.own = thread, own

    def _thread_slots(self, thread: int) -> list[Any]:
        return self.opened.get(thread) or self.opened.setdefault(thread, [None] * len(self.slots))

    def open(self, name: str, thread: int) -> None:
        """Open a range on the calling thread, if wanted."""
        if thread != self.thread:
            if not self.wanted and (self.wanted is False or not profiler_is_recording()):
                return
            if thread in self.quiet:
                return
        own, slot = self._thread_slots(thread), self.slots[name]
        own[slot] = own[slot], enter_range(name, publicly=bool(_public_alone))

    def close(self, name: str, thread: int) -> None:
        """Close the innermost open range with this name."""
        own, slot = self.opened.get(thread), self.slots[name]
        if own and own[slot]:
            own[slot], entry = own[slot]
            leave_range(entry)
            if own is not self.own and not any(own):
                del self.opened[thread]

    def has(self, name: str, thread: int) -> bool:
        """Return whether a thread has an open range with this name."""
        own = self.opened.get(thread)
        return bool(own and own[self.slots[name]])

    def end(self, thread: int) -> None:
        """Close all ranges of a thread whose forward has ended or was interrupted."""
        if thread == self.thread:
            self.thread, self.own = -1, []
        own = self.opened.pop(thread, [])
        for left_open in own if own.count(None) < len(own) else ():
            while left_open:
                left_open, entry = left_open
                leave_range(entry)

    def __len__(self) -> int:
        return sum(entry is not None for own in self.opened.values() for entry in own)


# Two tracers on one model would open every range twice, so only the first one opens them.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def claim_ranges(router: nn.Module, tracer: object) -> bool:
    """Claim a router's ranges unless another active tracer has them; return whether `tracer` opens them."""
    owner = _owners.get(router)
    held_by = None if owner is None else owner()
    if held_by is None:
        _owners[router] = weakref.ref(tracer)
    return held_by is None or held_by is tracer


def release_ranges(router: nn.Module, tracer: object) -> None:
    """Release the claim, if this tracer holds it."""
    owner = _owners.get(router)
    if owner is not None and owner() is tracer:
        del _owners[router]
