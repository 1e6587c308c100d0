"""Hooks of one router while Dynamo traces them or a stream is captured into a CUDA graph by hand.

They use tensor operations only, since a clock, ranges, dicts or threads would cause a graph break. Because
the call is only being compiled, a single one is in progress.
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
    """Reader of a router's calls that writes them into the router's rings.

    Nothing is written into a program that `torch.export` makes, since it is part of no recording.
    """

    def __init__(self, site: RouterSite, rings: SiteRings) -> None:
        self.rings = rings
        self._site = site
        self._read = site.read
        self._fused_block = site.read_block is not None
        self._calls_experts = site.experts is not None
        """Not read from the site: to Dynamo, and in an exported program, a module has the name by which it
        was reached first."""
        self.call: Call | None = None
        """The call in progress; reset before the graph ends, which would have to return it otherwise."""
        self._written = False
        self._shared = site.shares_router
        self._listens = not self._shared
        """Whether calls of the router belong to this site."""

    def before_block(self) -> None:
        """Handle a call of the block that contains the router."""
        if self._shared:
            self._listens = True
        if self._fused_block:
            self._written = False

    def before_router(self, args: Any) -> None:
        """Begin a call."""
        if self._listens:
            self.call = Call(router_args=args)

    def after_router(self, output: Any) -> None:
        """Keep the router's output; end the call if no experts module follows."""
        if self.call is not None and output is not None:
            self.call.router_output = output
            if not self._calls_experts:
                self._write()

    def after_watched(self, output: Any) -> None:
        """Keep the output of the watched module; see `Found.watched`."""
        if self.call is not None:
            self.call.watched_output = output

    def after_experts(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the experts and end the call."""
        if self.call is not None:
            self.call.experts_args = args
            self.call.experts_kwargs = kwargs
            self._write()

    def after_block(self, args: Any, output: Any) -> None:
        """Handle the return of the block, which may not have called its experts, or even its router."""
        if self._shared:
            self._listens = False
        if self.call is not None:
            self._write()
        elif self._fused_block and not self._written and output is not None:
            self._read_and_write(self._site.read_block, args, output)

    def take(self) -> Call | None:
        """Return and clear the call in progress, whose router was compiled and whose experts run eagerly."""
        call, self.call = self.call, None
        return call if call is not None and call.router_output is not None else None

    def _write(self) -> None:
        call, self.call = self.call, None
        if self._fused_block:
            self._written = True
        self._read_and_write(self._read, call)

    def _read_and_write(self, read: Any, *given: Any) -> None:
        try:
            reading: RouterOutput = read(*given)
        except Exception:  # no error may abort the tracing of the user's code
            self.rings.misread()
            return
        if is_exporting():
            return
        if is_compiling():
            self.rings.write(reading)
        else:
            self.rings.write_captured(reading)


class CapturedCalls:
    """Calls of one router while streams are captured by hand: read, written to the rings, and located.

    Other threads may run eagerly meanwhile, or capture graphs of their own, so calls are kept by thread.

    Args:
        rings: rings that the graphs write to.
        notes: positions of router and experts in the captured graphs.
    """

    def __init__(self, site: RouterSite, rings: SiteRings, notes: CaptureNotes) -> None:
        self._site, self._rings, self._notes = site, rings, notes
        self.open: dict[int, TracedSite] = {}
        """The call in progress, by thread."""
        self.state = SiteState()
        """State of the site, shared with its tracer."""

    def begin(self, thread: int, args: Any, *, own: bool) -> None:
        """Begin a call of the router.

        Args:
            own: whether the call belongs to this site, and not to another one that shares the router.
        """
        self.open[thread] = call = TracedSite(self._site, self._rings)
        if own:
            call.before_block()
            call.before_router(args)
            self._notes.begin(self._site.name, self._site.site, "router")

    def end_router(self, thread: int, output: Any) -> bool:
        """Handle the return of a router; return whether its call was open here."""
        call = self.open.get(thread)
        if call is None:
            return False
        self._notes.end(self._site.name, "router")
        call.after_router(output)
        if output is None or call.call is None:
            del self.open[thread]
        return True

    def begin_experts(self, thread: int) -> bool:
        """Handle the call of experts; return whether it belongs to a call open here."""
        if thread not in self.open:
            return False
        self._notes.begin(self._site.name, self._site.site, "experts")
        return True

    def end_experts(self, thread: int, args: Any, kwargs: dict[str, Any]) -> bool:
        """Handle the return of experts, or their error; return whether it ended a call open here."""
        call = self.open.pop(thread, None)
        if call is None:
            return False
        if self._site.times_experts:
            self._notes.end(self._site.name, "experts")
        self.state.experts_called = True
        call.after_experts(args, kwargs)
        return True

    def end_block(self, thread: int, args: Any, output: Any) -> None:
        """Handle the return of the block, or its error; an open call has called no experts module."""
        if output is None:
            self.open.pop(thread, None)
        elif self.state.experts_called:
            self.lose(thread)
        elif (call := self.open.pop(thread, None)) is not None:
            call.after_block(args, output)

    def lose(self, thread: int) -> bool:
        """Count a call open on a thread as lost: its experts were not called, or its capture failed."""
        if self.open.pop(thread, None) is None:
            return False
        self.state.seen += 1
        self.state.lost["unjoined"] += 1
        return True
