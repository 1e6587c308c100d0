"""Hooks that compiled code expects and that record nothing, for the time between two tracers of a model.

Dynamo recompiles a model when the hooks in its code have been removed, and the new code ignores later hooks.
So where code was compiled under a tracer, its hooks stay installed when the tracer stops. Inside the graph
they cost the same as while it was active; they keep the rings alive, but no other recorded data. The next
tracer of the same routers replaces them with its own hooks, which write to the same rings.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.inplace_outputs import TensorCopies
from moe_trace.record.forward.isolation import Failures
from moe_trace.record.forward.ranges import OpenRanges
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled_rings import ModelRings
from moe_trace.record.graphs.forwards import GraphForwards, Segment
from moe_trace.record.graphs.memory import captures_now, device_of
from moe_trace.record.graphs.ring_reader import RingReader
from moe_trace.record.hooks.entry_modules import ModelEntry
from moe_trace.record.hooks.events import EventLog
from moe_trace.record.hooks.model import ModelHooks
from moe_trace.record.hooks.site import HooksOn, Level, SiteHooks


class MutedHooks:
    """Replacements for the hooks of a stopped tracer, until the model is freed or another tracer starts."""

    def __init__(self, hooks: ModelHooks, graphs: RingReader, on: Sequence[HooksOn]) -> None:
        self.sites = [router.site for router in hooks.routers]
        self.graphs: tuple[CompiledGraph, ...] = graphs.launches.graphs()
        self.rings = ModelRings(
            self.sites,
            GraphForwards(lambda: 0, lambda _: False),
            started=_no_op,
            counting=_no_op,
            keeps_ids=any(rings.keeps_ids for rings in graphs.rings.sites),
        )
        self.rings.take_over(graphs.rings)
        self.failures = Failures()
        self._outermost: int | None = None
        """Level of the module through which the current forward entered the model."""
        self._entries = [ModelEntry(entry.module, entry.level, self, self.rings) for entry in hooks.entries]
        for entry in self._entries:
            entry.install()
        log, ranges = EventLog(), OpenRanges()
        log.note, ranges.wanted = _no_op, False
        shared: dict[str, Any] = {"ranges": ranges, "captures": CaptureNotes(), "log": log, "owner": None}
        self._routers: list[SiteHooks] = []
        for index, (site, rings, as_before) in enumerate(zip(self.sites, self.rings.sites, on, strict=True)):
            clock = _NoClock() if as_before.timed else None
            router = SiteHooks(site, index, rings=rings, clock=clock, **shared)
            router.copies = _NoCopies()
            router.sending = _no_op if as_before.sending else None
            router.put_on_as(as_before)
            self._routers.append(router)
        self.on = {_key(site): as_before for site, as_before in zip(self.sites, on, strict=True)}
        _muted.add(self)

    def remove(self) -> None:
        _muted.discard(self)
        for entry in self._entries:
            entry.remove()
        for router in self._routers:
            router.set_level(Level.OFF)

    def shares(self, sites: Sequence[RouterSite]) -> bool:
        """Return whether any of these routers has the muted hooks."""
        routers = {id(site.router) for site in self.sites}
        return any(id(site.router) in routers for site in sites)

    @property
    def moved(self) -> bool:
        """Whether a router has moved to a device other than that of its rings."""
        return any(
            ring.counter.device != device_of(site.router)
            for site, rings in zip(self.sites, self.rings.sites, strict=True)
            for ring in rings.made().values()
        )

    def begin(self, entry: ModelEntry, args: Any, kwargs: dict[str, Any], replica: bool) -> None:
        """Handle the call of an entry module."""
        if replica or captures_now():
            return
        if self._outermost is None or entry.level <= self._outermost:
            self._outermost = entry.level
            self.rings.begin_on_host()  # compiled code reads this

    def end(self, entry: ModelEntry, output: Any) -> None:
        """Handle the return of an entry module."""
        if captures_now():
            return
        self.rings.end_in_graph(entry.level)
        if entry.level == self._outermost:
            self._outermost = None
            self.rings.end_on_host()


_muted = weakref.WeakSet[MutedHooks]()


def mute(hooks: ModelHooks, graphs: RingReader) -> None:
    """Remove a tracer's hooks, leaving muted ones where compiled code expects hooks."""
    on = [router.hooks_on for router in hooks.routers]
    hooks.remove()
    graphs.launches.stop()
    if graphs.release():
        MutedHooks(hooks, graphs, on)


def unmute(sites: Sequence[RouterSite], graphs: RingReader) -> list[HooksOn | None]:
    """Remove the muted hooks from these routers, and let `graphs` read their rings from the next forward on.

    Returns:
        Per router, the hooks to install so that compiled code is reused; empty if there is no such code.
    """
    found: list[HooksOn | None] = []
    for muted in [hooks for hooks in _muted if hooks.shares(sites)]:
        muted.remove()
        if not (found or muted.moved) and graphs.take_over(muted.rings, muted.graphs):
            found = [muted.on.get(_key(site)) for site in sites]
    graphs.mark(Segment(0, profiled=False, sampled=False), in_trace=False)  # what ran without a tracer
    missing = [site.name for site, on in zip(sites, found, strict=True) if on is None] if found else []
    if missing:
        warnings.warn(
            f"code of this model was compiled under a tracer that left out {missing[0]}"
            f"{f' and {len(missing) - 1} more routers' if missing[1:] else ''}; torch may use it again, and "
            "their calls are not recorded then. Call tracer.recompile() after starting this tracer",
            RuntimeWarning,
            stacklevel=4,
        )
    return found


def remove_all() -> None:
    """Remove all muted hooks, of any model; code compiled with hooks is then recompiled."""
    for muted in list(_muted):
        muted.remove()


def recompile() -> None:
    """Discard all code compiled by torch.compile in this process, so that it is recompiled with hooks.

    Use this for a tracer started after the first compiled call, and for models that should run without the
    recording compiled into them. Everything compiled is recompiled at its next call.
    """
    remove_all()
    torch.compiler.reset()


def _key(site: RouterSite) -> tuple[int, str]:
    return id(site.router), site.name


def _no_op(*_: Any) -> None: ...


class _NoClock:
    start = stop = keep = staticmethod(_no_op)


class _NoCopies(TensorCopies):
    """Copies nothing, because nothing is recorded."""

    def router_output(self, output: Any) -> Any:
        return output

    def receive(self, args: Any, kwargs: dict[str, Any]) -> None: ...

    def received(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs

    def copy(self, value: Any) -> Any:
        return value
