"""The model's forward that is being traced or captured."""

from __future__ import annotations

from threading import get_ident

from torch import Tensor

from moe_trace.record.graphs.ids_ring import IdsRing
from moe_trace.record.graphs.ring_buffer import GraphRing


class ForwardInGraph:
    """The model's forward that is being traced or captured; outside of one, its routers write at once.

    A compiler makes one kernel of all routers' writes when they stand together at the end of the forward, and
    one for every second router where they stand apart.
    """

    def __init__(self) -> None:
        self.on_host = False
        """Whether the host saw the forward under way begin: then no module inside it begins one."""
        self._code: int | None = None
        self.level = 0
        """Of the module that it began with."""
        self._waiting: list[tuple[GraphRing | IdsRing, Tensor, int]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a forward was begun that has not ended."""
        return self.on_host or self._code is not None

    def start(self, stage_code: int, level: int, *, together: bool) -> None:
        """The model's forward begins.

        Args:
            level: of the module that it begins with, and will end with.
            together: its routers' writes shall wait for its end. Not where a backward will follow: what waits
                cannot leave a layer that is checkpointed.
        """
        self._code, self.level = stage_code << 1 | 1, level
        self._waiting = [] if together else None

    def write(self, ring: GraphRing | IdsRing, body: Tensor, tokens: int) -> None:
        """Write a row, now or at the end."""
        if self._waiting is None:
            ring.put(body, tokens, self._code)
        else:
            self._waiting.append((ring, body, tokens))

    def end(self, level: int) -> None:
        """A module that the model may be entered through has returned."""
        if self._code is None or level != self.level:
            return
        for ring, body, tokens in self._waiting or ():
            ring.put(body, tokens, self._code)
        self.forget()

    def forget(self, on_host: bool = False) -> None:
        """No forward is under way, or one `on_host`; what one left that was interrupted is dropped."""
        self._code = self._waiting = None
        self.on_host = on_host


class CapturedForwards:
    """The forwards that are being captured by hand; other threads run, or capture, forwards of their own."""

    def __init__(self) -> None:
        self._by_thread: dict[int, ForwardInGraph] = {}

    def now(self) -> ForwardInGraph:
        """That of the calling thread; one that was not begun where blocks are captured alone."""
        return self._by_thread.get(get_ident()) or ForwardInGraph()

    def begins(self, level: int) -> bool:
        """Whether a forward of the calling thread begins with a module of that level."""
        around = self._by_thread.get(get_ident())
        if around is not None and around.level < level:
            return False
        self._by_thread[get_ident()] = ForwardInGraph()
        return True

    def end(self, level: int) -> None:
        """A module returned."""
        if self.now().level == level:
            self.forget()

    def forget(self) -> None:
        """None is under way on the calling thread."""
        self._by_thread.pop(get_ident(), None)
