"""All hooks of one tracer: those on its routers and those on the entry modules of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from moe_trace.find.private.torch_names import skip_in_dynamo
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.forward.batch_tokens import BatchTokens, TokenProvider
from moe_trace.record.forward.ranges import OpenRanges
from moe_trace.record.forward.steps import Steps
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled import compiled_parts
from moe_trace.record.graphs.ring_reader import RingReader
from moe_trace.record.hooks.all_sites import HookLevels
from moe_trace.record.hooks.entry_modules import ModelEntry, entry_modules
from moe_trace.record.hooks.events import CallClock, EventLog
from moe_trace.record.hooks.fast_hooks import ListedExpert, PlainCalls, PlainRanges
from moe_trace.record.hooks.forwards import ForwardWatch
from moe_trace.record.hooks.router_outputs import CallCollector
from moe_trace.record.hooks.site import HooksOn, Level, SiteHooks
from moe_trace.record.hooks.site_observer import SiteObserver
from moe_trace.record.parallel.dispatch import DispatchInfo


class ModelHooks:
    """Installer and owner of the hooks on a model and its routers.

    Args:
        steps: assigns forwards to steps, and decides which are recorded.
        graphs: destination of decisions made inside compiled code or a CUDA graph.
        captures: notes the position of routers in a graph that is captured by hand.
        clock: additional clock for routers and experts.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        *,
        steps: Steps,
        recorder: Recorder,
        graphs: RingReader,
        captures: CaptureNotes,
        clock: CallClock | None,
    ) -> None:
        self._model = model
        self.silence_told = False
        """Whether the user was warned of forwards whose compiled code has no hooks."""
        self._ranges, log = OpenRanges(), EventLog()
        shared: dict[str, Any] = {"ranges": self._ranges, "captures": captures, "clock": clock}
        self.routers = [
            SiteHooks(site, index, rings=rings, owner=self, log=log, **shared)
            for index, (site, rings) in enumerate(zip(sites, graphs.rings.sites, strict=True))
        ]
        self._levels = HookLevels(self.routers, self._ranges)
        self.watch = ForwardWatch(
            model, self.routers, steps, recorder, graphs, self._ranges, self._levels, log, owner=self
        )
        self.calls = self.watch.calls = CallCollector(
            self.routers,
            log=log,
            forwards=self.watch.forwards,
            outside=self.watch.outside,
            recorder=recorder,
            clock=clock,
        )
        self._levels.on_others = self.calls.forget_plans
        self.entries = [
            ModelEntry(module, level, self.watch, graphs.rings)
            for module, level in entry_modules(model, sites)
        ]

    def install(
        self,
        *,
        recording: bool,
        sending: Callable[[Any], DispatchInfo | None] | None,
        compiled: Sequence[HooksOn | None] = (),
    ) -> None:
        """Install all hooks.

        Args:
            recording: whether the current step is recorded. The hook on the model checks this again at its
                next forward; calling a submodule does not reach that hook.
            sending: returns, from the arguments of the experts, what a call moves between processes.
            compiled: per router, the hooks in code that is already compiled.
        """
        owners = (ModelEntry, SiteObserver, PlainCalls, PlainRanges, ListedExpert)
        skip_in_dynamo(hook for owner in owners for hook in owner.hooks())
        for router in self.routers:
            router.sending = sending
        if compiled:
            self.watch.recorder.may_defer = False  # as when a graph is captured
        elif compiled_parts(self._model):
            self.watch.graph_started()
        for entry in self.entries:
            entry.install()
        self.watch.send_events()
        if compiled:
            self._levels.put_on_as(compiled)
        else:
            self._levels.set(Level.RANGES if recording else Level.OFF)

    def describe(self, told: BatchTokens | TokenProvider | None) -> None:
        """Set the tokens of forwards, as described by a host framework: see `MoETracer.describe_tokens`."""
        source, graphs = self.watch.source, self.watch.graphs
        graphs.rings.tells |= told is not None
        if isinstance(told, BatchTokens):
            source.next = told
            graphs.describe(told)
        else:
            source.provider, source.next = told, None

    def remove(self) -> None:
        """Remove all hooks and close all ranges; unfinished router calls are recorded."""
        for entry in self.entries:
            entry.remove()
        self._levels.remove()
        for router in self.routers:
            for thread in list(router.capturing):
                router.captured.lose(thread)
        forwards = self.watch.forwards
        for thread in list(forwards.stacks):
            self.watch.failures.guarded(self._cut_off, thread)
        forwards.stacks.clear()
        forwards.last = None
        self.join()
        for thread in list(self._ranges.opened):
            self._ranges.end(thread)

    def _cut_off(self, thread: int) -> None:
        """End recording inside a forward: its open call is interrupted, and its other routers are missed."""
        context = self.watch.forwards.of(thread)
        if context is not None and context.recorded:
            context.failed = True
            self.calls.flush(thread)
            if not context.recomputed:
                self.watch.missing.look(context.reached)

    def join(self) -> None:
        """Join events from outside any forward of the model."""
        self.watch.failures.guarded(self.calls.flush, None)
        self.watch.failures.guarded(self.calls.finish_waiting)
