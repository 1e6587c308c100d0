"""What the hooks of one tracer saw, in the order in which it happened: plain tuples in one list.

The hooks append and do nothing else. Their events are joined into router calls when the forward ends
(`joining.py`). The second item of each event is the number of the site, the third the thread that it
happened on, so that any thread may append.
"""

from __future__ import annotations

from typing import Any

BEGIN = 0
"""(kind, site, thread, time in ns, arguments or None, mark of the clock): the router is called."""
ROUTER = 1
"""(kind, site, thread, time in ns, output, id of the backward or -1): it returned; None where it raised."""
WATCHED = 2
"""(kind, site, thread, output): see `Found.watched`."""
EXPERTS = 3
"""(kind, site, thread, arguments, keyword arguments, `DispatchInfo`, mark): the experts received these."""
BLOCK = 4
"""(kind, site, thread, time in ns): the block that holds the router is called."""
BLOCK_END = 5
"""(kind, site, thread, reading or error): it returned. A reading only where `Found.read_block` made one."""

Event = tuple[Any, ...]


class EventLog:
    """The events that are not joined yet. `events.append` is what the hooks call."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def take(self) -> list[Event]:
        """Remove what stands in it now; other threads may append meanwhile."""
        count = len(self.events)
        taken = self.events[:count]
        del self.events[:count]
        return taken
