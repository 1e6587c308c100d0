"""What the hooks on one router do while dynamo traces them: tensor work only, or the graph would break.

No clock, no ranges, no dicts and no threads: a single call is under way, because it is only being compiled.
"""

from __future__ import annotations

from typing import Any

from moe_trace.find.contracts import Call, ContractMismatch
from moe_trace.find.routers import RouterSite
from moe_trace.record.graphs.rings import SiteRings


class TracedSite:
    """Reads a call of one router and writes it into the router's rings."""

    def __init__(self, site: RouterSite, rings: SiteRings) -> None:
        self.rings = rings
        self._site = site
        self._read = site.read
        self._fused_block = site.read_block is not None
        self._call: Call | None = None
        """None again before the graph ends: what is kept beyond it, the graph would have to return."""
        self._wrote = False

    def before_block(self) -> None:
        """The block that holds the router is called."""
        if self._fused_block:
            self._wrote = False

    def before_router(self, args: Any) -> None:
        """A call begins."""
        self._call = Call(router_args=args)

    def after_router(self, output: Any) -> None:
        """The router returned; the call ends here if no experts module follows."""
        if self._call is not None and output is not None:
            self._call.router_output = output
            if self._site.experts is None:
                self._write()

    def after_watched(self, output: Any) -> None:
        """See `Found.watched`."""
        if self._call is not None:
            self._call.watched_output = output

    def before_experts(self, args: Any, kwargs: dict[str, Any]) -> None:
        """The experts receive the decision: the call ends."""
        if self._call is not None:
            self._call.experts_args = args
            self._call.experts_kwargs = kwargs
            self._write()

    def after_block(self, args: Any, output: Any) -> None:
        """The block returned, perhaps without having called its experts, or even its router."""
        if self._call is not None:
            self._write()
        elif self._fused_block and not self._wrote:
            try:
                self.rings.write(self._site.read_block(args, output))  # type: ignore[misc]
            except ContractMismatch:
                self.rings.misread()

    def _write(self) -> None:
        call, self._call = self._call, None
        if self._fused_block:
            self._wrote = True
        try:
            reading = self._read(call)  # type: ignore[arg-type]
        except ContractMismatch:
            self.rings.misread()
            return
        self.rings.write(reading)
