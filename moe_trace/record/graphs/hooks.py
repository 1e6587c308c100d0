"""What the hooks on one router do while dynamo traces them: tensor work only, or the graph would break.

No clock, no ranges, no dicts and no threads: a single call is under way, because it is only being compiled.
The same is done while a stream is captured into a CUDA graph by hand.
"""

from __future__ import annotations

from typing import Any

from torch.compiler import is_compiling

from moe_trace.find.contracts import Call, RouterOutput
from moe_trace.find.private.torch_names import is_exporting
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.router_call import SiteState
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled_rings import SiteRings


class TracedSite:
    """Reads a call of one router and writes it into the router's rings.

    Nothing is written into a program that `torch.export` makes: it belongs to nobody's recording.
    """

    def __init__(self, site: RouterSite, rings: SiteRings) -> None:
        self.rings = rings
        self._site = site
        self._read = site.read
        self._fused_block = site.read_block is not None
        self._calls_experts = site.experts is not None
        """Not asked of the site: to dynamo, and in an exported program, a module has the name by which it was
        reached first."""
        self.call: Call | None = None
        """None again before the graph ends: what is kept beyond it, the graph would have to return."""
        self._wrote = False
        self._shared = site.shares_router
        self._listens = not self._shared
        """Whether a call of the router is one of this site."""

    def before_block(self) -> None:
        """The block that holds the router is called."""
        if self._shared:
            self._listens = True
        if self._fused_block:
            self._wrote = False

    def before_router(self, args: Any) -> None:
        """A call begins."""
        if self._listens:
            self.call = Call(router_args=args)

    def after_router(self, output: Any) -> None:
        """The router returned; the call ends here if no experts module follows."""
        if self.call is not None and output is not None:
            self.call.router_output = output
            if not self._calls_experts:
                self._write()

    def after_watched(self, output: Any) -> None:
        """See `Found.watched`."""
        if self.call is not None:
            self.call.watched_output = output

    def after_experts(self, args: Any, kwargs: dict[str, Any]) -> None:
        """The experts received the decision: the call ends."""
        if self.call is not None:
            self.call.experts_args = args
            self.call.experts_kwargs = kwargs
            self._write()

    def after_block(self, args: Any, output: Any) -> None:
        """The block returned, perhaps without having called its experts, or even its router."""
        if self._shared:
            self._listens = False
        if self.call is not None:
            self._write()
        elif self._fused_block and not self._wrote and output is not None:
            self._put(self._site.read_block, args, output)

    def take(self) -> Call | None:
        """The call under way, whose router was compiled and whose experts run eagerly."""
        call, self.call = self.call, None
        return call if call is not None and call.router_output is not None else None

    def _write(self) -> None:
        call, self.call = self.call, None
        if self._fused_block:
            self._wrote = True
        self._put(self._read, call)

    def _put(self, read: Any, *given: Any) -> None:
        try:
            reading: RouterOutput = read(*given)
        except Exception:  # whatever it is, it must not end the tracing of the user's code
            self.rings.misread()
            return
        if is_exporting():
            return
        if is_compiling():
            self.rings.write(reading)
        else:
            self.rings.write_captured(reading)


class CapturedCalls:
    """Calls of one router while streams are captured by hand: read, written, and noted where they stand.

    Other threads run eagerly meanwhile, or capture graphs of their own, so the calls are kept by thread.

    Args:
        rings: where graphs write.
        notes: where router and experts stand.
    """

    def __init__(self, site: RouterSite, rings: SiteRings, notes: CaptureNotes) -> None:
        self._site, self._rings, self._notes = site, rings, notes
        self.open: dict[int, TracedSite] = {}
        """By thread, that under way."""
        self.state = SiteState()
        """Of the site, which its tracer shares."""

    def begin(self, thread: int, args: Any, *, own: bool) -> None:
        """The router is called.

        Args:
            own: whether for this site, and not for another one that shares it.
        """
        self.open[thread] = call = TracedSite(self._site, self._rings)
        if own:
            call.before_block()
            call.before_router(args)
            self._notes.begin(self._site.name, self._site.site, "router")

    def end_router(self, thread: int, output: Any) -> bool:
        """A router returned; whether it was one of these calls."""
        call = self.open.get(thread)
        if call is None:
            return False
        self._notes.end(self._site.name, "router")
        call.after_router(output)
        if output is None or call.call is None:
            del self.open[thread]
        return True

    def begin_experts(self, thread: int) -> bool:
        """Experts are called; whether by one of these calls."""
        if thread not in self.open:
            return False
        self._notes.begin(self._site.name, self._site.site, "experts")
        return True

    def end_experts(self, thread: int, args: Any, kwargs: dict[str, Any]) -> bool:
        """They returned, or raised."""
        call = self.open.pop(thread, None)
        if call is None:
            return False
        if self._site.times_experts:
            self._notes.end(self._site.name, "experts")
        self.state.experts_called = True
        call.after_experts(args, kwargs)
        return True

    def end_block(self, thread: int, args: Any, output: Any) -> None:
        """The block returned, or raised. What is open called its router, and no experts that are a module."""
        if output is None:
            self.open.pop(thread, None)
        elif self.state.experts_called:
            self.lose(thread)
        elif (call := self.open.pop(thread, None)) is not None:
            call.after_block(args, output)

    def lose(self, thread: int) -> bool:
        """Count what is open on a thread, which is over: its experts were computed without being called, or
        its capture failed."""
        if self.open.pop(thread, None) is None:
            return False
        self.state.seen += 1
        self.state.lost["unjoined"] += 1
        return True
