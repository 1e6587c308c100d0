"""Join what the hooks saw into router calls: per site, thread and execution of the block.

Router calls, experts calls and blocks are observed apart. A router call has none, one or several calls of
its experts, which may run on another thread. What does not join is counted with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from moe_trace.find.contracts import Call
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.hooks.events import (
    BEGIN,
    BLOCK,
    BLOCK_END,
    CONTEXT,
    EXPERTS,
    KINDS,
    ROUTER,
    ROWS,
    WIDTH,
)


@dataclass(slots=True)
class ExpertsCall:
    """One call of an experts module, as it received it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sending: Any = None
    mark: Any = None
    recomputed: bool = False
    """Where its router is not called again with it, it belongs to a decision of the forward."""


@dataclass(slots=True, eq=False)
class RouterCall(Call):
    """One call of a router with all that was joined to it."""

    site: int = 0
    thread: int = 0
    context: ForwardContext | None = None
    start_ns: int = 0
    end_ns: int = 0
    mark: Any = None
    recomputed: bool = False
    returned: bool = False
    experts: list[ExpertsCall] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)
    """(number of the expert, rows) of each call of one that is a module of its own."""
    fused: bool = False
    """Its block ended without having called any experts."""
    reading: Any = None
    """Of a block that called neither its router nor its experts: what `Found.read_block` read."""


class SiteState:
    """What earlier events of a site taught."""

    __slots__ = ("block_seen", "experts_called")

    def __init__(self) -> None:
        self.experts_called = False
        """Whether its experts were ever called as a module."""
        self.block_seen = False
        """Whether its block is observed."""


class CallJoiner:
    """Turns events into router calls, in the order in which the routers were called.

    Args:
        experts: of each site, the module whose call ends the decision; None where there is none.
        context_of: the forward that a thread is in, for the first event of a call.
        orphan: told the site of each experts call that belongs to no router call.
    """

    def __init__(
        self,
        experts: Sequence[object],
        *,
        context_of: Callable[[int], ForwardContext],
        orphan: Callable[[int], None],
    ) -> None:
        self.states = [SiteState() for _ in experts]
        self._needs_experts = [one is not None for one in experts]
        self._sharing = [
            [
                site
                for site, other in enumerate(experts)
                if other is one and experts.count(one) > 1 and one is not None
            ]
            for one in experts
        ]
        """Of each site, all that call the same experts as it, if there are others."""
        self._context_of = context_of
        self._orphan = orphan
        self._open: dict[tuple[int, int], RouterCall] = {}
        """The last router call by site and thread."""
        self._blocks: dict[tuple[int, int], list[RouterCall]] = {}
        """Router calls of the block under way."""
        self._begun: list[RouterCall] = []
        """All calls that are not finished, in order."""
        self._orphans: list[tuple[int, ExpertsCall]] = []
        self._contexts: dict[int, ForwardContext] = {}
        """Of the call that a thread begins next."""

    @property
    def idle(self) -> bool:
        """Whether no call is under way."""
        return not self._begun

    def add(self, items: Sequence[Any], context: ForwardContext | None = None) -> None:
        """Fold events in.

        Args:
            context: the forward that they belong to; None for whatever each of their threads is in.
        """
        columns = (items[column::WIDTH] for column in range(WIDTH))
        for code, thread, first, second, third in zip(*columns, strict=True):
            site, kind = divmod(code, KINDS)
            if kind == BEGIN:
                within = self._contexts.pop(thread, None) or context or self._context_of(thread)
                self._begin(site, thread, within, first, second, third)
            elif kind == EXPERTS:
                self._experts(site, thread, ExpertsCall(first, second, *(third or ())))
            elif kind == CONTEXT:
                self._contexts[thread] = first
            elif kind == BLOCK:
                self.states[site].block_seen = True
                self._blocks[site, thread] = []
            elif kind == BLOCK_END:
                self._end_block(site, thread, first)
            elif kind == ROWS:
                self._rows(site, thread, (first, second))
            else:
                call = self._open.get((site, thread))
                if call is None:
                    continue
                if kind == ROUTER:
                    call.end_ns, call.router_output = first, second
                    call.returned, call.recomputed = second is not None, third != -1
                else:
                    call.watched_output = first

    def _experts(self, site: int, thread: int, experts: ExpertsCall) -> None:
        self.states[site].experts_called = True
        call = self._open.get((site, thread))
        called = [c for s in self._sharing[site] if (c := self._open.get((s, thread))) and c.returned]
        if called and max(called, key=attrgetter("end_ns")) is not call:
            return  # its hooks see the calls of other layers too
        if call is None or not call.returned:
            call = self._router_of(site, experts)
        if call is None:
            self._orphans.append((site, experts))
        else:
            call.experts.append(experts)

    def _rows(self, site: int, thread: int, rows: tuple[int, int]) -> None:
        call = self._open.get((site, thread))
        if call is None or not call.returned:
            others = [c for (s, _), c in self._open.items() if s == site and c.returned]
            call = others[0] if len(others) == 1 else None
        if call is not None:
            call.rows.append(rows)

    def _begin(
        self, site: int, thread: int, context: ForwardContext, start_ns: int, args: Any, mark: Any
    ) -> None:
        call = RouterCall(args, site=site, thread=thread)
        call.context, call.start_ns, call.mark = context, start_ns, mark
        self._open[site, thread] = call
        self._begun.append(call)
        block = self._blocks.get((site, thread))
        if block is not None:
            block.append(call)

    def _router_of(self, site: int, experts: ExpertsCall) -> RouterCall | None:
        """The router call of experts called on another thread: by its tensors, else the only one."""
        found = [c for (s, _), c in self._open.items() if s == site and c.returned]
        given = {id(value) for value in (*experts.args, *experts.kwargs.values()) if value is not None}
        for call in found:
            output = call.router_output
            parts = output if isinstance(output, tuple | list) else (output,)
            if any(id(part) in given for part in parts):
                return call
        return found[0] if len(found) == 1 else None

    def _end_block(self, site: int, thread: int, reading: Any) -> None:
        calls = self._blocks.pop((site, thread), None)
        if reading is not None and not calls:
            call = RouterCall(site=site, thread=thread)
            call.context = self._context_of(thread)
            call.start_ns = call.end_ns = reading[0]
            call.reading, call.recomputed, call.returned = reading[1], reading[2], True
            self._begun.append(call)
        elif calls and not any(call.experts for call in calls):
            returned = [call for call in calls if call.returned]
            if returned:  # where the router is called more than once, the last one decides
                returned[-1].fused = True

    def finished(self, ended: Callable[[int], bool]) -> list[RouterCall]:
        """Remove the calls to which nothing can be joined any more.

        Args:
            ended: whether the forward that a thread was in has ended.
        """
        still: list[RouterCall] = []
        done: list[RouterCall] = []
        for call in self._begun:
            (done if ended(call.thread) else still).append(call)
        self._begun = still
        for key in [key for key in self._open if ended(key[1])]:
            del self._open[key]
        for key in [key for key in self._blocks if ended(key[1])]:
            del self._blocks[key]
        if self._orphans:
            self._retry_orphans(keep=bool(still))
        return done

    def passed(self) -> list[RouterCall]:
        """Remove the calls whose thread has begun another one since, and that are complete by all signs."""
        last: dict[int, RouterCall] = {call.thread: call for call in self._begun}
        done = [call for call in self._begun if last[call.thread] is not call and self._is_complete(call)]
        if done:
            gone = set(map(id, done))
            self._begun = [call for call in self._begun if id(call) not in gone]
            for key in [key for key, call in self._open.items() if id(call) in gone]:
                del self._open[key]
        return done

    def _is_complete(self, call: RouterCall) -> bool:
        if call.experts or call.reading is not None:
            return True
        return call.returned and not self._needs_experts[call.site]

    def _retry_orphans(self, *, keep: bool) -> None:
        orphans, self._orphans = self._orphans, []
        for site, experts in orphans:
            call = self._router_of(site, experts)
            if call is not None:
                call.experts.append(experts)
            elif keep:
                self._orphans.append((site, experts))
            elif not experts.recomputed:
                self._orphan(site)

    def forget(self, thread: int) -> None:
        """Drop what a thread has under way: its forward was interrupted, and no hook saw it."""
        self._begun = [call for call in self._begun if call.thread != thread]
        for table in (self._open, self._blocks):
            for key in [key for key in table if key[1] == thread]:
                table.pop(key)
