"""Join hook events into router calls, per site, thread and execution of the block.

Router calls, experts calls and blocks are observed separately. A router call has none, one or several calls
of its experts. If several router calls are possible, experts are matched by the memory of what they received,
then by the execution of the block and by the thread; on another thread, by memory or by the only running
block that waits for experts. What cannot be joined is counted with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any

from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.router_call import Block, ExpertsCall, RouterCall, SiteState, by_memory
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


class CallJoiner:
    """Builder of router calls from events, in the order in which the routers were called.

    Args:
        context_of: returns the forward of a thread, for the first event of a call.
        orphan: called with the site of each experts call that belongs to no router call.
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        *,
        states: list[SiteState],
        context_of: Callable[[int], ForwardContext],
        orphan: Callable[[int], None],
    ) -> None:
        self.states = states
        self._sites, experts = sites, [site.experts for site in sites]
        self._sharing = [
            [
                site
                for site, other in enumerate(experts)
                if other is module and experts.count(module) > 1 and module is not None
            ]
            for module in experts
        ]
        """Per site, all sites that call the same experts, itself included; empty if there are no others."""
        self._context_of = context_of
        self._orphan = orphan
        self._open: dict[tuple[int, int], list[RouterCall]] = {}
        """Unfinished router calls by site and thread, in order."""
        self._blocks: dict[tuple[int, int], list[Block]] = {}
        """Running executions of the block by site and thread, outermost first."""
        self.begun: list[RouterCall] = []
        """All unfinished calls, in order."""
        self._orphans: list[tuple[int, ExpertsCall]] = []
        """(site, call) of experts that belong to no router call so far."""
        self._contexts: dict[int, ForwardContext] = {}
        """Context of the next call, by thread."""

    def add(self, items: Sequence[Any], context: ForwardContext | None = None) -> None:
        """Process events.

        Args:
            context: forward to which they belong; None to use the current one of each thread.
        """
        columns = (items[column::WIDTH] for column in range(WIDTH))
        for code, thread, first, second, third in zip(*columns, strict=True):
            site, kind = divmod(code, KINDS)
            if kind == BEGIN:
                within = self._contexts.pop(thread, None) or context or self._context_of(thread)
                self._begin(site, thread, within, first, second, third)
            elif kind == EXPERTS:
                self._experts(site, thread, first, second, third)
            elif kind == CONTEXT:
                self._contexts[thread] = first
            elif kind == BLOCK:
                block = Block(context or self._context_of(thread))
                self._blocks.setdefault((site, thread), []).append(block)
            elif kind == BLOCK_END:
                self._end_block(site, thread, first)
            elif kind == ROWS:
                self._rows(site, thread, (first, second))
            else:
                self._end_router(site, thread, kind, first, second, third)

    def _end_router(self, site: int, thread: int, kind: int, first: Any, second: Any, third: Any) -> None:
        call = next((c for c in reversed(self._open.get((site, thread), ())) if not c.end_ns), None)
        if call is None:
            return
        if kind == ROUTER:
            call.end_ns, call.router_output = first, second
            call.returned, call.recomputed = second is not None, third != -1
        else:
            call.watched_output = first

    def _experts(self, site: int, thread: int, args: Any, kwargs: Any, extra: Any) -> None:
        self.states[site].experts_called = True
        latest = self._last(site, thread)
        called = [c for s in self._sharing[site] if (c := self._last(s, thread))]
        if called and max(called, key=attrgetter("end_ns")) is not latest:
            return  # the hooks also see calls of other layers
        if args is None:
            if latest is not None:
                latest.refused = True
            return
        experts = ExpertsCall(args, kwargs or {}, *(extra or ()))
        if latest is None and self.states[site].thread not in (None, thread):
            self.states[site].elsewhere = True
        call = self._router_of(site, experts, latest)
        if call is not None:
            call.experts.append(experts)
            return
        blocks = self._blocks_of(site)
        waits = len(blocks) == 1 and any(call.returned for call in blocks[0].calls)
        (blocks[0].elsewhere if waits else self._orphans).append((site, experts))

    def _last(self, site: int, thread: int) -> RouterCall | None:
        """Return the thread's last router call in its current block, or None."""
        blocks = self._blocks.get((site, thread))
        calls = (blocks[-1].calls if blocks else ()) or self._open.get((site, thread))
        return calls[-1] if calls and calls[-1].returned else None

    def _router_of(self, site: int, experts: ExpertsCall, own: RouterCall | None) -> RouterCall | None:
        """Return the router call of experts, matched by memory if calls of other threads are possible."""
        served = own is None or bool(own.experts)
        others = [
            call
            for (other, _), calls in self._open.items()
            if other == site
            for call in calls
            if call.returned and call is not own and (served or not call.experts)
        ]
        if not others:
            return own
        found = by_memory(experts, [*others, *([] if own is None else [own])])
        if len(found) > 1 and own not in found:  # one buffer, which routers reuse
            found = [call for call in found if not call.experts]
        if len(found) == 1:
            return found[0]
        return own if not found or own in found else None

    def _blocks_of(self, site: int) -> list[Block]:
        """Return the running executions of a site's block, on all threads."""
        return [block for (s, _), blocks in self._blocks.items() if s == site for block in blocks]

    def _rows(self, site: int, thread: int, rows: tuple[int, int]) -> None:
        call = self._last(site, thread)
        if call is None:
            state, blocks = self.states[site], self._blocks_of(site)
            state.elsewhere = True
            waiting = [c for block in blocks for c in block.calls if c.returned]
            if len(blocks) == 1 and waiting and not state.loose:
                call = waiting[-1]
            else:  # the matching call is unknown
                for other in (other for (s, _), calls in self._open.items() if s == site for other in calls):
                    other.unjoined = True
        if call is not None:
            call.rows.append(rows)

    def _begin(
        self, site: int, thread: int, context: ForwardContext, start_ns: int, args: Any, mark: Any
    ) -> None:
        blocks = self._blocks.get((site, thread))
        if not blocks and self._sites[site].shares_router:
            return  # a call of another layer
        call = RouterCall(args, site=site, thread=thread)
        self.states[site].thread = thread
        call.context, call.start_ns, call.mark = context, start_ns, mark
        self._open.setdefault((site, thread), []).append(call)
        self.begun.append(call)
        if blocks:
            blocks[-1].calls.append(call)

    def _end_block(self, site: int, thread: int, reading: Any) -> None:
        blocks = self._blocks.get((site, thread))
        if not blocks:
            return
        block, state = blocks.pop(), self.states[site]
        returned = [call for call in block.calls if call.returned]
        if reading is not None and not block.calls:
            call = RouterCall(site=site, thread=thread)
            call.context = self._context_of(thread)
            call.start_ns = call.end_ns = reading[0]
            call.reading, call.recomputed, call.returned = reading[1], reading[2], True
            self.begun.append(call)
        elif returned and not any(call.experts or call.rows for call in block.calls):
            # If the router is called more than once, the last call decides.
            if block.elsewhere and not state.loose:
                returned[-1].experts += [experts for _, experts in block.elsewhere]
                block.elsewhere = []
            else:
                returned[-1].fused = not returned[-1].refused
                state.loose = True
        self._orphans += block.elsewhere

    def finished(self, under_way: Collection[ForwardContext]) -> list[RouterCall]:
        """Remove and return the calls to which nothing can be joined any more.

        Args:
            under_way: forwards that have not ended.
        """
        done = [call for call in self.begun if call.context not in under_way]
        self._remove(done)
        for key, blocks in list(self._blocks.items()):
            remaining = [block for block in blocks if block.context in under_way]
            self._orphans += [
                orphan for block in blocks if block not in remaining for orphan in block.elsewhere
            ]
            self._blocks[key] = remaining
            if not remaining:
                del self._blocks[key]
        if self._orphans:
            self._retry_orphans(keep=bool(self.begun))
        return done

    def _remove(self, calls: Sequence[RouterCall]) -> None:
        if len(calls) == len(self.begun):
            self.begun = []
            self._open.clear()
            return
        removed = set(calls)
        self.begun = [call for call in self.begun if call not in removed]
        for key in {(call.site, call.thread) for call in calls} & self._open.keys():
            self._open[key] = [call for call in self._open[key] if call not in removed]
            if not self._open[key]:
                del self._open[key]

    def passed(self) -> list[RouterCall]:
        """Remove and return calls that appear complete and whose thread has begun another one since."""
        last: dict[int, RouterCall] = {call.thread: call for call in self.begun}
        done = [call for call in self.begun if last[call.thread] is not call and self._is_complete(call)]
        self._remove(done)
        return done

    def _is_complete(self, call: RouterCall) -> bool:
        if call.experts or call.reading is not None:
            return True
        return call.returned and self._sites[call.site].experts is None

    def _retry_orphans(self, *, keep: bool) -> None:
        orphans, self._orphans = self._orphans, []
        for site, experts in orphans:
            call = self._router_of(site, experts, None)
            if call is not None:
                call.experts.append(experts)
            elif keep:
                self._orphans.append((site, experts))
            elif not experts.recomputed:
                self._orphan(site)
