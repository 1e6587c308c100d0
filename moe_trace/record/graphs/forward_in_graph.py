"""State of a model's forward that is being traced or captured."""

from __future__ import annotations

from threading import get_ident

from torch import Tensor

from moe_trace.record.graphs.ids_ring import IdsRing
from moe_trace.record.graphs.ring_buffer import GraphRing


class ForwardInGraph:
    """The model's forward that is being traced or captured; outside of one, routers write immediately.

    A compiler fuses all routers' writes into one kernel if they are together at the end of the forward, and
    generates one kernel for every second router if they are not.
    """

    def __init__(self) -> None:
        self.on_host = False
        """Whether the host saw the forward in progress begin: then no module inside it begins one."""
        self._code: int | None = None
        self.level = 0
        """Level of the module that the forward began with."""
        self._waiting: list[tuple[GraphRing | IdsRing, Tensor, int]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a forward has begun and not ended."""
        return self.on_host or self._code is not None

    def start(self, stage_code: int, level: int, *, together: bool) -> None:
        """Begin a forward of the model.

        Args:
            level: level of the module that the forward begins and ends with.
            together: whether the routers' writes are deferred to the end of the forward. Must be False if a
                backward will follow: deferred tensors cannot leave a checkpointed layer.
        """
        self._code, self.level = stage_code << 1 | 1, level
        self._waiting = [] if together else None

    def write(self, ring: GraphRing | IdsRing, body: Tensor, tokens: int) -> None:
        """Write a row, now or at the end of the forward."""
        if self._waiting is None:
            ring.put(body, tokens, self._code)
        else:
            self._waiting.append((ring, body, tokens))

    def end(self, level: int) -> None:
        """Write the deferred rows and end the forward, if it began with a module of this level."""
        if self._code is None or level != self.level:
            return
        for ring, body, tokens in self._waiting or ():
            ring.put(body, tokens, self._code)
        self.forget()

    def forget(self, on_host: bool = False) -> None:
        """Reset to no forward in progress, or to one that began `on_host`; drop deferred rows."""
        self._code = self._waiting = None
        self.on_host = on_host


class CapturedForwards:
    """The forwards that are being captured by hand, by thread: other threads may run or capture their own."""

    def __init__(self) -> None:
        self._by_thread: dict[int, ForwardInGraph] = {}

    def now(self) -> ForwardInGraph:
        """Return the calling thread's forward; one that was not begun if blocks are captured alone."""
        return self._by_thread.get(get_ident()) or ForwardInGraph()

    def begins(self, level: int) -> bool:
        """Return whether a module of that level begins a forward on the calling thread; if so, begin it."""
        running = self._by_thread.get(get_ident())
        if running is not None and running.level < level:
            return False
        self._by_thread[get_ident()] = ForwardInGraph()
        return True

    def end(self, level: int) -> None:
        """End the calling thread's forward if it began with a module of this level."""
        if self.now().level == level:
            self.forget()

    def forget(self) -> None:
        """Drop the calling thread's forward."""
        self._by_thread.pop(get_ident(), None)
