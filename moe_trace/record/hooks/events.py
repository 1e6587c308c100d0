"""Events that the hooks of one tracer observe, in order of time: one flat list with `WIDTH` items per event.

The hooks extend it and do nothing else. When the forward ends, the events are joined into router calls: in
columns if it ran like earlier ones (`repeated_forwards.py`), else one by one (`joining.py`). An event is

    (number that encodes kind and site, thread on which it occurred, and three items that depend on the kind)

Any thread may add events at any time; a flat list contains nothing that Python's garbage collector must scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from moe_trace.data.schema import RangeKind

BEGIN = 0
"""Router called: (time in ns, arguments or None, mark of the clock)."""
ROUTER = 1
"""Router returned: (time in ns, output or None if it raised, id of the backward pass or -1)."""
WATCHED = 2
"""Watched module returned: (output, None, None). See `Found.watched`."""
EXPERTS = 3
"""Experts called: (arguments, keyword arguments or None, None or (`DispatchInfo`, mark) and, in a backward
pass, True). Arguments are None if a hook before the experts raised, so that they received nothing."""
BLOCK = 4
"""Block that holds the router called: (time in ns, None, None)."""
BLOCK_END = 5
"""Block returned: (reading or error or None, None, None). Only `Found.read_block` makes readings."""
CONTEXT = 6
"""Context of the next call, outside any forward of the model: (`ForwardContext`, None, None)."""
ROWS = 7
"""Expert that is a module of its own called: (number of the expert, rows, None)."""

WIDTH = 5
KINDS = 8

Event = tuple[Any, Any, Any, Any, Any]


def event_code(kind: int, site: int) -> int:
    """Return the first item of an event."""
    return site * KINDS + kind


class CallClock(Protocol):
    """Clock that times routers and experts in addition to the host's; must not wait for the device."""

    def start(self, args: tuple[Any, ...]) -> Any:
        """Return a mark. Called just before the module runs, with its arguments."""

    def stop(self, mark: Any) -> None:
        """Stop timing. Called just after the module ran."""

    def keep(self, name: str, call: int, kind: RangeKind, mark: Any) -> None:
        """Assign the mark to a recorded call. Marks never assigned did not time a recorded call."""


class EventLog:
    """Events that are not joined yet."""

    __slots__ = ("items", "note", "waiting")

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.note: Callable[[Event], Any] = self.items.extend
        """Called by the hooks with an event: adds it to the list, or has it inspected first."""
        self.waiting = 0
        """Number of items, at the front, that belong to pending forwards (`repeated_forwards.py`)."""

    def take(self, *, waiting: bool = False) -> list[Any]:
        """Remove and return pending forwards' items, or the ones behind; other threads may add meanwhile."""
        start, end = (0, self.waiting) if waiting else (self.waiting, len(self.items))
        if waiting:
            self.waiting = 0
        taken = self.items[start:end]
        del self.items[start:end]
        return taken

    def last_first(self, site: int, thread: int) -> Iterator[tuple[int, list[Any]]]:
        """Yield (kind, three items) of each event of a site on a thread, last event first."""
        items = self.items
        for start in range(len(items) - WIDTH, self.waiting - 1, -WIDTH):
            code, on = items[start], items[start + 1]
            if on == thread and code // KINDS == site:
                yield code % KINDS, items[start + 2 : start + WIDTH]
