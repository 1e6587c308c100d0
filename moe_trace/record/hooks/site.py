"""Install the hooks on one router, its experts and its block: as few as the current forward needs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from moe_trace.find.private.module_calls import ids_of_hooks
from moe_trace.find.private.torch_names import hooks_of
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.inplace_outputs import TensorCopies
from moe_trace.record.calls.pending import Usual
from moe_trace.record.forward.copied_models import HookOwner
from moe_trace.record.forward.ranges import claim_ranges, release_ranges
from moe_trace.record.graphs.compiled import give_stable_id
from moe_trace.record.graphs.memory import cuda_is_used
from moe_trace.record.hooks.fast_hooks import ListedExpert, PlainCalls, PlainRanges
from moe_trace.record.hooks.site_observer import SiteObserver


class Level(IntEnum):
    """Extent of the installed hooks."""

    OFF = 0
    RECORD = 1
    """Decisions and host times."""
    RANGES = 2
    """The block as well, and ranges while a profiler records."""


@dataclass(frozen=True)
class HooksOn:
    """Installed hooks of a site and their positions, as a compiler sees them."""

    level: Level
    of_block: tuple[bool, bool]
    copies: bool
    ranged: bool
    timed: bool
    """Whether an additional clock is used."""
    sending: bool
    first: bool


def hooks_of_others(site: RouterSite) -> tuple[tuple[int, ...], ...]:
    """Return ids of others' hooks that may change a router's output or its experts' arguments."""
    of_experts = () if site.experts is None else ids_of_hooks(site.experts, but_of=HookOwner)
    return ids_of_hooks(site.router, but_of=HookOwner, pre=False), of_experts


class SiteHooks(SiteObserver):
    """Installer of the hooks of one site.

    Args:
        owner: tracer that claims the router's ranges; None for hooks that record nothing.
        others: see `SiteObserver`.
    """

    def __init__(self, *arguments: Any, owner: object | None, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.level = Level.OFF
        self.read = self.site.read
        self.usual: Usual = {}
        """Usual versions of its calls' tensors, learned after copying has stopped."""
        self._owner = owner
        self.reads_block = self.site.read_block is not None
        """Whether the block is hooked to read it, until it has called its router."""
        self._of_block = (self.observe_block, self.reads_block)
        self._router_hooks: tuple[int, ...] = ()
        self._others: tuple[tuple[int, ...], ...] = ()
        """Hooks when ours were installed: all of the router's, and others' on the router and its experts."""
        self._copies_received = False
        """Whether a hook copies the experts' arguments before they run."""
        self._plain_calls = PlainCalls(self, self._index, self._log)
        self._plain_ranges = PlainRanges(self, self._index, self._log, self._ranges)
        self._first = True
        """Whether hooks may be placed before those of others."""

    # -- installed hooks ------------------------------------------------------------------------------

    def is_current(self, level: Level) -> bool:
        """Return whether the installed hooks are those that `level` needs.

        Hooks that others add to a router later would change its output after ours, which must come last.
        """
        return (
            level == self.level
            and (self.observe_block, self.reads_block) == self._of_block
            and (level == Level.OFF or self._copies_received == (self.copies is not None))
            and (level == Level.OFF or self._router_hooks == tuple(hooks_of(self.site.router)))
            and (level == Level.OFF or self._others == hooks_of_others(self.site))
        )

    def set_level(self, level: Level, *, first: bool = True) -> None:
        """Install the hooks of a level.

        Args:
            first: whether hooks may be placed before those of others. Compiled hooks may not: dynamo names a
                hook by its place in `dict.keys(...)`, which does not reflect that an ordered dict moved it to
                the front, and torch 2.11 then fails on its own guard.
        """
        self._remove()
        self.level, self._first = level, first
        if level == Level.OFF:
            return
        self._install(level)
        for handle in self._handles:
            give_stable_id(handle)
        self._router_hooks = tuple(hooks_of(self.site.router))
        self._others = hooks_of_others(self.site)

    @property
    def hooks_on(self) -> HooksOn:
        return HooksOn(
            level=self.level,
            of_block=self._of_block,
            copies=self._copies_received,
            ranged=self.ranged,
            timed=self._clock is not None,
            sending=self.sending is not None,
            first=self._first,
        )

    def put_on_as(self, on: HooksOn) -> None:
        self.observe_block, self.reads_block = on.of_block
        self.ranged = on.ranged
        if not on.copies:
            self.copies = None
        elif self.copies is None:
            self.copies = TensorCopies()
        self.set_level(on.level, first=on.first)

    def _install(self, level: Level) -> None:
        site, add = self.site, self._handles.append
        self._of_block = (self.observe_block, self.reads_block)
        ranged = self.ranged
        if self._owner is not None:
            ranged = self.ranged = claim_ranges(site.router, self._owner) and level == Level.RANGES
        timed = ranged or self._clock is not None or level == Level.RANGES
        self.look_at_device()
        self._copies_received = self.copies is not None
        block, router, experts = site.block, site.router, site.experts
        hooks = self._plain(level) or self
        if block is not None and (ranged or self.observe_block or self.reads_block):
            of_block = hooks if isinstance(hooks, PlainRanges) and True not in self._of_block else self
            # Inside all other hooks when it is read, since the weights of a sharded router are still gathered
            # there; outside them when it is a range.
            inner = self.reads_block and self._first
            add(block.register_forward_pre_hook(of_block.before_block, prepend=self._first))
            add(
                block.register_forward_hook(
                    of_block.after_block, always_call=True, with_kwargs=True, prepend=inner
                )
            )
        add(router.register_forward_pre_hook(hooks.before_router, prepend=timed and self._first))
        add(router.register_forward_hook(hooks.after_router, always_call=True))
        if site.watched is not None:
            add(site.watched.register_forward_hook(self._after_watched))
        if experts is not None:
            self._times_experts = timed and site.times_experts
            if self._times_experts:
                before = hooks.before_experts if isinstance(hooks, PlainRanges) else self.before_experts
                add(experts.register_forward_pre_hook(before, prepend=self._first))
            if self._copies_received:
                add(experts.register_forward_pre_hook(self._before_copied, with_kwargs=True))
            add(experts.register_forward_hook(hooks.after_experts, always_call=True, with_kwargs=True))
        for number, expert in enumerate(site.listed):
            before_expert = ListedExpert(expert, self._index, number, self._log).before
            add(expert.register_forward_pre_hook(before_expert, with_kwargs=True))

    def _plain(self, level: Level) -> PlainCalls | None:
        """Return the hooks for plain calls; None if there will be no plain calls."""
        if (
            self._clock is not None
            or self._keeps_arguments
            or self.copies is not None
            or self.sending is not None
            or self.site.shares_router
            or (level == Level.RANGES and not self.ranged)
        ):
            return None
        hooks = self._plain_calls if level == Level.RECORD else self._plain_ranges
        hooks.start()
        return hooks

    def look_at_device(self) -> None:
        """Note whether CUDA is used: only then does each call check for a captured stream."""
        self.on_cuda = self._plain_calls.on_cuda = self._plain_ranges.on_cuda = cuda_is_used()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._owner is not None:
            release_ranges(self.site.router, self._owner)

    def settle(self) -> None:
        """Stop observing, from the next forward on, what a recorded forward has shown to be irrelevant."""
        before, state = (self.observe_block, self.reads_block), self.captured.state
        if not self.irregular:
            self.observe_block = False
        if state.seen and not state.fused:
            self.reads_block = False
        if before != (self.observe_block, self.reads_block):
            self.on_change()

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to learn about the block."""
        return not self.reads_block and (self.irregular or not self.observe_block)

    def end_copies(self) -> None:
        """End a forward; stop copying tensors once they are known not to be overwritten."""
        if self.copies is not None:
            self.copies.end_forward()
            if self.copies.settled:
                self.copies = None
                self.on_change()

    def copy_from_now_on(self, *, static: bool = True) -> None:
        """Copy the tensors of calls from now on: always, or until this is known to be unnecessary.

        Args:
            static: whether the router reuses the memory of its earlier outputs.
        """
        self.copies, self.usual = TensorCopies(static=static), {}
        self._plain_calls.stop()
        self._plain_ranges.stop()
        self.on_change()
