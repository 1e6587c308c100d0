"""How much is hooked now on the routers of a model, whose hooks all threads inside the model share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from moe_trace.find.private.torch_names import hooks_of
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.forward.ranges import OpenRanges, profiler_is_recording
from moe_trace.record.graphs.memory import cuda_is_used
from moe_trace.record.hooks.site import HooksOn, Level, SiteHooks, hooks_of_others


class HookLevels:
    """Puts the hooks of all routers on and off, as the forwards under way need them."""

    def __init__(self, hooks: Sequence[SiteHooks], ranges: OpenRanges) -> None:
        self._ranges = ranges
        self.kept = False
        """Compiled code has the hooks in it, so they stay on: what they see in a forward that is not
        recorded is forgotten when it ends."""
        self._hooks = hooks
        self.wanted: dict[int, Level] = {}
        """By thread inside the model: what its forward needs."""
        self.level: Level | None = None
        """What the hooks were set to last; None where they have to be asked one by one."""
        self._router_hooks = [hooks_of(one.site.router) for one in hooks]
        self._cuda_is_used = False
        """Whether it was when the hooks were told."""
        self.stale = False
        """Whether a block needs other hooks than are on."""
        for one in hooks:
            one.on_change = self._change
        self.unsettled = list(hooks)
        """Whose block may come to need no hook."""
        self._installed: list[int] = []
        """How many hooks each router had when ours were put on."""
        self._others: list[tuple[tuple[int, ...], ...]] = []
        """Hooks of others on each router and its experts."""
        self._handles = 0
        """Hooks that were ever put on anything when those were looked at."""
        self._lock = threading.RLock()
        self.on_others: Callable[[], object] = lambda: None
        """Told that somebody put hooks on a router or its experts, or took them off."""

    def want(self, context: ForwardContext, thread: int) -> None:
        """The calling thread begins a forward: hook what it needs."""
        ranges, level = self._ranges, Level.RECORD
        if not context.recorded:
            ranges.quiet.add(thread)
            if self.level != Level.OFF:
                self.set(Level.OFF, thread)
            return
        if ranges.quiet:
            ranges.quiet.discard(thread)
        if context.profiled and profiler_is_recording():
            ranges.want(thread)
            level = Level.RANGES
        else:
            ranges.wanted = None if ranges.wanted else False
        if RemovableHandle.next_id != self._handles and not self.kept:
            self._look_at_others()
        if cuda_is_used() is not self._cuda_is_used:
            self.look_at_devices()
        self.wanted[thread] = level
        if level != self.level or len(self.wanted) > 1 or [*map(len, self._router_hooks)] != self._installed:
            self.set(level, thread)

    def set(self, level: Level, thread: int | None = None) -> None:
        """Hook what `level` needs; cheap when nothing changes.

        Args:
            thread: whose forward needs it; of all threads, the one that needs most wins.
        """
        with self._lock:
            if thread is not None:
                self.wanted[thread] = level
                if len(self.wanted) > 1:
                    level = max(self.wanted.values())
            # Those of others that were put on since stand behind ours: see `SiteHooks.is_current`.
            if level == self.level:
                if self.kept or level == Level.OFF or [*map(len, self._router_hooks)] == self._installed:
                    return
                self.on_others()
            self.level = level
            if not self._others:
                self._look_at_others()
            for hooks in self._hooks:
                if not (hooks.is_current(level) or (self.kept and hooks.level >= level)):
                    hooks.set_level(level)
            self._installed = [*map(len, self._router_hooks)]

    def look_at_devices(self) -> None:
        """CUDA may be used from now on, as where the model was moved to a GPU."""
        self._cuda_is_used = cuda_is_used()
        for hooks in self._hooks:
            hooks.look_at_device()

    def _look_at_others(self) -> None:
        """Hooks of others that come may write into what experts are given, before or after them."""
        self._handles, before = RemovableHandle.next_id, self._others
        self._others = [hooks_of_others(one.site) for one in self._hooks]
        if before and self._others != before:
            self.level = None
            self.on_others()

    def put_on_as(self, compiled: Sequence[HooksOn | None]) -> None:
        """Hook as code that was compiled before expects it, so that it is used again; all where None."""
        self.kept, self.level = True, None
        for hooks, on in zip(self._hooks, compiled, strict=True):
            if on is None:
                hooks.set_level(Level.RANGES, first=False)
            else:
                hooks.put_on_as(on)

    def keep(self) -> None:
        """Compiled code has the hooks in it from now on; may run while it is being traced.

        All of them: torch 2.14 guards its code on the hooks of each module, so that one put on later, when a
        profiler starts, would have it compiled again within the profile.
        """
        self.kept = True
        self.level = None
        for hooks in self._hooks:
            # Dynamo does not stand hooks that change while it traces them.
            if hooks.level == Level.OFF or not torch.compiler.is_compiling():
                hooks.set_level(Level.RANGES, first=False)

    def _change(self) -> None:
        self.stale, self.level = True, None

    def settle_blocks(self) -> None:
        """Whose calls need no hook on their block, now that a forward has shown it."""
        for router in self._hooks:
            router.settle()
        self.unsettled = [router for router in self.unsettled if not router.settled]

    def settle(self) -> None:
        """Take off what need not be observed any more, unless a thread is inside or code is compiled.

        At once and not when the next forward begins: `torch.cuda.make_graphed_callables` takes no module with
        hooks, and is called in between.
        """
        if self.kept or not self.stale:
            return
        with self._lock:
            if self.wanted:
                return
            self.stale = False
            for hooks in self._hooks:
                if hooks.level != Level.OFF and not hooks.is_current(hooks.level):
                    hooks.set_level(hooks.level)
            self._installed = list(map(len, self._router_hooks))

    def remove(self) -> None:
        """Take all hooks off, whoever wants them."""
        with self._lock:
            self.wanted.clear()
            self.level = None
            for hooks in self._hooks:
                hooks.set_level(Level.OFF)
