"""Install and remove the hooks on all routers of a model, which the threads inside the model share."""

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
    """Installer of the hooks on all routers, as the current forwards need them."""

    def __init__(self, hooks: Sequence[SiteHooks], ranges: OpenRanges) -> None:
        self._ranges = ranges
        self.kept = False
        """Whether compiled code contains the hooks, so that they stay installed; what they observe in a
        forward that is not recorded is discarded when it ends."""
        self._hooks = hooks
        self.wanted: dict[int, Level] = {}
        """Level that the forward of each thread inside the model needs."""
        self.level: Level | None = None
        """Level set last; None if each router has to be checked."""
        self._router_hooks = [hooks_of(router.site.router) for router in hooks]
        self._cuda_is_used = False
        """Whether CUDA was in use when the hooks were last informed."""
        self.stale = False
        """Whether a block needs other hooks than those installed."""
        for router in hooks:
            router.on_change = self._change
        self.unsettled = list(hooks)
        """Routers whose block may come to need no hook."""
        self._installed: list[int] = []
        """Number of hooks on each router after ours were installed."""
        self._others: list[tuple[tuple[int, ...], ...]] = []
        """Hooks of others on each router and its experts."""
        self._handles = 0
        """Number of hooks ever registered in the process when those were inspected."""
        self._lock = threading.RLock()
        self.on_others: Callable[[], object] = lambda: None
        """Called after others have added hooks to a router or its experts, or removed them."""

    def want(self, context: ForwardContext, thread: int) -> None:
        """Install the hooks for a forward that the calling thread begins."""
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
            self._check_others()
        if cuda_is_used() is not self._cuda_is_used:
            self.look_at_devices()
        self.wanted[thread] = level
        if level != self.level or len(self.wanted) > 1 or [*map(len, self._router_hooks)] != self._installed:
            self.set(level, thread)

    def set(self, level: Level, thread: int | None = None) -> None:
        """Install the hooks of a level; cheap if nothing changes.

        Args:
            thread: thread whose forward needs the level; the highest level of all threads is used.
        """
        with self._lock:
            if thread is not None:
                self.wanted[thread] = level
                if len(self.wanted) > 1:
                    level = max(self.wanted.values())
            # Hooks that others added since come after ours: see `SiteHooks.is_current`.
            if level == self.level:
                if self.kept or level == Level.OFF or [*map(len, self._router_hooks)] == self._installed:
                    return
                self.on_others()
            self.level = level
            if not self._others:
                self._check_others()
            for hooks in self._hooks:
                if not (hooks.is_current(level) or (self.kept and hooks.level >= level)):
                    hooks.set_level(level)
            self._installed = [*map(len, self._router_hooks)]

    def look_at_devices(self) -> None:
        """Update the hooks for CUDA being used from now on, e.g. after the model was moved to a GPU."""
        self._cuda_is_used = cuda_is_used()
        for hooks in self._hooks:
            hooks.look_at_device()

    def _check_others(self) -> None:
        """Detect hooks added by others, which may write into the experts' arguments before or after them."""
        self._handles, before = RemovableHandle.next_id, self._others
        self._others = [hooks_of_others(router.site) for router in self._hooks]
        if before and self._others != before:
            self.level = None
            self.on_others()

    def put_on_as(self, compiled: Sequence[HooksOn | None]) -> None:
        """Install the hooks that existing compiled code expects, so that it is reused; all hooks if None."""
        self.kept, self.level = True, None
        for hooks, on in zip(self._hooks, compiled, strict=True):
            if on is None:
                hooks.set_level(Level.RANGES, first=False)
            else:
                hooks.put_on_as(on)

    def keep(self) -> None:
        """Keep the hooks installed, because compiled code contains them. May run during tracing.

        All of them stay: torch 2.14 guards compiled code on the hooks of each module, so a hook added later,
        when a profiler starts, would cause recompilation within the profile.
        """
        self.kept = True
        self.level = None
        for hooks in self._hooks:
            # Dynamo does not support hooks that change during tracing.
            if hooks.level == Level.OFF or not torch.compiler.is_compiling():
                hooks.set_level(Level.RANGES, first=False)

    def _change(self) -> None:
        self.stale, self.level = True, None

    def settle_blocks(self) -> None:
        """Stop hooking blocks that a finished forward has shown to need no hook."""
        for router in self._hooks:
            router.settle()
        self.unsettled = [router for router in self.unsettled if not router.settled]

    def settle(self) -> None:
        """Remove hooks no longer needed, unless a thread is inside the model or code is compiled.

        This happens at once, not when the next forward begins: `torch.cuda.make_graphed_callables` accepts no
        module with hooks, and is called in between.
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
        """Remove all hooks, whichever threads need them."""
        with self._lock:
            self.wanted.clear()
            self.level = None
            for hooks in self._hooks:
                hooks.set_level(Level.OFF)
