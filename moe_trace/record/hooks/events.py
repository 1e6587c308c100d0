"""What the hooks of one tracer saw, in the order in which it happened: one flat list, `WIDTH` items an event.

The hooks extend it and do nothing else. Their events are joined into router calls when the forward ends: in
columns where it ran as earlier ones did (`repeated_forwards.py`), else one by one (`joining.py`). An event is

    (kind and site in one number, thread that it happened on, and three items that its kind says)

Any thread may add one at any time; a flat list gives Python's garbage collector nothing to look through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from moe_trace.data.schema import RangeKind

BEGIN = 0
"""(time in ns, arguments or None, mark of the clock): the router is called."""
ROUTER = 1
"""(time in ns, output, id of the backward or -1): it returned; output None where it raised."""
WATCHED = 2
"""(output, None, None): see `Found.watched`."""
EXPERTS = 3
"""(arguments, keyword arguments or None, None or (`DispatchInfo`, mark) and, in a backward, True): experts
received these. None instead of arguments where a hook before them raised, so that they received nothing."""
BLOCK = 4
"""(time in ns, None, None): the block that holds the router is called."""
BLOCK_END = 5
"""(reading or error or None, None, None): it returned. A reading only where `Found.read_block` made one."""
CONTEXT = 6
"""(`ForwardContext`, None, None): that of the call that begins next, outside any forward of the model."""
ROWS = 7
"""(number of the expert, rows, None): one of the experts that are modules of their own is called."""

WIDTH = 5
KINDS = 8

Event = tuple[Any, Any, Any, Any, Any]


def event_code(kind: int, site: int) -> int:
    """The first item of an event."""
    return site * KINDS + kind


class CallClock(Protocol):
    """Times a router's module and its experts beside the host's clock; must not wait for the device."""

    def start(self, args: tuple[Any, ...]) -> Any:
        """Called just before the module runs, with its arguments; returns a mark."""

    def stop(self, mark: Any) -> None:
        """Called just after it ran."""

    def keep(self, name: str, call: int, kind: RangeKind, mark: Any) -> None:
        """The mark belongs to this recorded call. A mark that is never kept timed no recorded call."""


class EventLog:
    """The events that are not joined yet."""

    __slots__ = ("items", "note", "waiting")

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.note: Callable[[Event], Any] = self.items.extend
        """What the hooks call: adds to the list, or has somebody look at each event first."""
        self.waiting = 0
        """How many items, the first ones, are those of forwards that wait (`repeated_forwards.py`)."""

    def take(self, *, waiting: bool = False) -> list[Any]:
        """Remove those of the forwards that wait, or what stands behind them now; other threads may add
        meanwhile."""
        start, end = (0, self.waiting) if waiting else (self.waiting, len(self.items))
        if waiting:
            self.waiting = 0
        taken = self.items[start:end]
        del self.items[start:end]
        return taken

    def last_first(self, site: int, thread: int) -> Iterator[tuple[int, list[Any]]]:
        """(kind, its three items) of each event of a site on a thread, the last one first."""
        items = self.items
        for at in range(len(items) - WIDTH, self.waiting - 1, -WIDTH):
            code, on = items[at], items[at + 1]
            if on == thread and code // KINDS == site:
                yield code % KINDS, items[at + 2 : at + WIDTH]
