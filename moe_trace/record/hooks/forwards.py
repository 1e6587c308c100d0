"""Begin and end forwards of the model, on the host and in graphs, and install the hooks that each needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from threading import get_ident
from time import time_ns
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from moe_trace.data.schema import Stage, range_name
from moe_trace.find.contracts.modules import unwrapped
from moe_trace.find.private.module_calls import is_inside
from moe_trace.find.private.torch_names import (
    any_thread_is_profiled,
    graph_task_id,
    may_be_compiled,
    tracing_state,
)
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.forward.batch_tokens import TokenSource
from moe_trace.record.forward.context import Entered, ForwardContext, ForwardStack
from moe_trace.record.forward.isolation import Failures
from moe_trace.record.forward.ranges import OpenRanges, claim_ranges, profiler_is_recording
from moe_trace.record.forward.steps import Steps
from moe_trace.record.forward.unreached_routers import MissingSites
from moe_trace.record.graphs.compiled import is_compiled
from moe_trace.record.graphs.memory import captures_now
from moe_trace.record.graphs.ring_reader import RingReader
from moe_trace.record.hooks.all_sites import HookLevels
from moe_trace.record.hooks.checks import KEPT_BYTES_MAX, bytes_of_token
from moe_trace.record.hooks.entry_modules import ModelEntry
from moe_trace.record.hooks.events import EventLog
from moe_trace.record.hooks.router_outputs import CallCollector
from moe_trace.record.hooks.site import Level, SiteHooks
from moe_trace.record.routes.recorder import RoutesRecorder


@dataclass(eq=False)
class ForwardWatch:
    """Tracker of a model's forwards, called by the hooks on its entry modules."""

    model: nn.Module
    routers: list[SiteHooks]
    steps: Steps
    recorder: Recorder
    graphs: RingReader
    ranges: OpenRanges
    levels: HookLevels
    log: EventLog
    owner: object
    """Owner that claims the routers' ranges."""
    forwards: ForwardStack = field(default_factory=ForwardStack)
    forwards_recorded: int = 0
    padding_unknown: int = 0
    failures: Failures = field(default_factory=Failures)
    source: TokenSource = field(default_factory=TokenSource)

    def __post_init__(self) -> None:
        sites = [router.site for router in self.routers]
        self.missing = MissingSites(self.model, sites)
        self._graph_range = range_name("graph", type(unwrapped(self.model)).__name__)
        self.ranges.slot(self._graph_range)
        self._skipped = ForwardContext(0, "prefill", recorded=False)
        self._token_bytes = sum(map(bytes_of_token, sites))
        self._busy, self._in_graph = self.forwards.stacks, self.graphs.rings.in_graph
        self._graphs_write = self.graphs.rings.counters
        """Not empty if any graph writes into a ring."""
        self.calls: CallCollector
        self.routes: RoutesRecorder | None = self.recorder.routes

    def abandon(self) -> None:
        """Discard router calls that an exception interrupted on this thread."""
        thread = get_ident()
        self.failures.guarded(self.calls.forget, thread)
        self._busy.pop(thread, None)

    def graph_started(self) -> None:
        """Note that part of the model is being compiled or captured. Runs during tracing or capture."""
        self.recorder.may_defer = False  # a graph's next replay overwrites its output tensors
        if is_compiling() or not captures_now():
            self.levels.keep()  # a captured graph contains none of the hooks' Python

    def outside(self) -> ForwardContext:
        """Return the context of a router called outside any forward, through a submodule."""
        stage: Stage = "train" if torch.is_grad_enabled() and self.model.training else "prefill"
        step = self.steps.now()
        context = ForwardContext(step, stage, None, self.graphs.forwards.epoch, self.steps.samples(step))
        context.of_model, context.profiled = False, any_thread_is_profiled()
        context.tokens = self.routes and self.routes.outside(step)
        return context

    # -- a forward ------------------------------------------------------------------------------------

    # The path of a usual forward makes few function calls: code that runs once per forward is in no cache.

    def begin(self, entry: ModelEntry, args: Any, kwargs: dict[str, Any], replica: bool = False) -> None:
        """Begin a forward, on a call of an entry module or of a replica of it."""
        thread, levels, graphs_write = get_ident(), self.levels, self._graphs_write
        if captures_now() or replica or thread in self._busy:
            self._begin_irregular(entry, thread, args, kwargs, replica)
            return
        if self.ranges.opened:
            self.ranges.end(thread)
        if len(self.log.items) != self.log.waiting and self.calls.flush(None):  # outside any forward
            self.recorder.end_forward()
        if graph_task_id() != -1 and self.forwards.last is not None:
            self._begin_rerun(self.forwards.last, entry, thread)
            return
        step, sampled = self.steps.begin()
        sampled = sampled and tracing_state() is None  # else torch.jit would trace it
        batch = self.source.take(wanted=sampled or bool(graphs_write)) if self.source.tells else None
        tokens, context = None, self._skipped  # shared by all forwards that are skipped
        if sampled or graphs_write:
            stage, tokens, named = entry.inputs.look(args, kwargs)
            profiled = sampled and any_thread_is_profiled()
            if profiled and (graphs_write or levels.kept) and profiler_is_recording():
                self._open_graph_range()
            context = ForwardContext(step, stage, None, 0, sampled, True, profiled, named, time_ns(), thread)
            if batch is not None:
                context.tell(batch)
        context.epoch = self.graphs.forwards.begin(context)
        self._busy[thread], self.forwards.last = [Entered(entry.level, context)], context
        if graphs_write:
            self.graphs.start_on_host(context)
        self._in_graph.on_host = True
        first = self.steps.forwards == 1
        if not levels.kept and (first or may_be_compiled()) and is_compiled(self.model, first=first):
            self.graph_started()  # else code compiled in a skipped step or before a profile lacks hooks
        levels.want(context, thread)
        if sampled:
            self.forwards_recorded += 1
            if kwargs or entry.inputs.names_mask or self.routes is not None:
                self._find_padding(context, entry, args, kwargs)
            self.send_events(tokens, context)

    def _begin_irregular(
        self, entry: ModelEntry, thread: int, args: Any, kwargs: dict[str, Any], replica: bool
    ) -> None:
        """Begin a forward while a stream is captured or another forward is running."""
        if captures_now():
            self.levels.look_at_devices()
            self.levels.set(Level.RANGES)  # needed to see where the experts end
            if thread not in self._busy:
                self.graphs.rings.start_captured(entry.inputs.stage(args, kwargs), entry.level)
            return
        stack = self._busy.get(thread)
        outside = stack is not None and entry.level <= stack[0].level and not is_inside(entry.module)
        if outside and graph_task_id() == -1:
            self.abandon()  # left by an interruption that no hook saw, such as Ctrl-C
            stack = None
        if not stack:
            parent = self.forwards.of(thread) if replica else None
            if parent is None:
                self.begin(entry, args, kwargs)
            else:  # DataParallel runs part of the batch on a separate thread
                self.forwards.push(thread, entry.level, self._replica_context(entry, parent, args, kwargs))
            return
        outer = stack[-1]
        outer.inside += 1
        context, own_inputs = outer.context, outer.inside > 1 or entry.level <= outer.level
        if context.recorded and not context.recomputed and (own_inputs or not context.told):
            context = self._begin_nested(entry, thread, context, args, kwargs)
        self.forwards.push(thread, entry.level, context)

    def _begin_rerun(self, context: ForwardContext, entry: ModelEntry, thread: int) -> None:
        """Rerun a forward that was checkpointed as a whole, in the backward pass: it is not a new step."""
        self.forwards.push(thread, entry.level, rerun := context.again())
        self.levels.want(rerun, thread)

    def _open_graph_range(self) -> None:
        """Open a range around the forward, which locates compiled code and graph launches in a trace."""
        if claim_ranges(self.routers[0].site.router, self.owner):
            self.ranges.want(get_ident())
            self.ranges.open(self._graph_range, get_ident())

    def _begin_nested(
        self, entry: ModelEntry, thread: int, context: ForwardContext, args: Any, kwargs: dict[str, Any]
    ) -> ForwardContext:
        """Return the context for a module inside another one.

        The module has its own inputs if those of the outer one did not identify the stage, or if the outer
        one calls several modules, such as one per token in `generate`.
        """
        stage, tokens, named = entry.inputs.look(args, kwargs)
        if not named or context.batch is not None:
            return context
        if context.told:
            self.calls.flush_passed()
            context = replace(context, padding_T=None, start_ns=time_ns(), stage=stage)
            context.epoch = self.graphs.forwards.begin(context)
            if self._graphs_write:
                self.graphs.start_on_host(context)
        context.stage, context.told = stage, True
        self._find_padding(context, entry, args, kwargs)
        self.send_events(tokens, context)
        return context

    def _replica_context(
        self, entry: ModelEntry, whole: ForwardContext, args: Any, kwargs: dict[str, Any]
    ) -> ForwardContext:
        context = whole.here()
        if context.recorded:
            context.told = entry.inputs.length(args, kwargs) is not None
            self._find_padding(context, entry, args, kwargs)
        return context

    def _find_padding(
        self, context: ForwardContext, entry: ModelEntry, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if context.batch is None:
            context.padding_T, unknown = entry.inputs.padding(args, kwargs)
            self.padding_unknown += unknown and not context.padding_unclear
            context.padding_unclear |= unknown
        if self.routes is not None:
            self.routes.look(context, entry.inputs, args, kwargs)

    def send_events(self, tokens: int | None = None, context: ForwardContext | None = None) -> None:
        """Select where events go: directly into the list in a forward known to be small."""
        log = self.log
        if context is not None and tokens is not None and len(self._busy) == 1:
            context.held_bytes = tokens * self._token_bytes
            if context.held_bytes <= KEPT_BYTES_MAX:
                log.note = log.items.extend
                return
        log.note = self.calls.checks.note

    def end(self, entry: ModelEntry, output: Any) -> None:
        """Leave an entry module that has returned; `output` is None if it raised."""
        thread, ranges, levels, log = get_ident(), self.ranges, self.levels, self.log
        stack, graphs_write = self._busy.get(thread), self._graphs_write
        if levels.kept or graphs_write:  # it may have begun before a graph break
            self.graphs.rings.end_in_graph(entry.level)
        if captures_now():
            return
        within = stack is None or len(stack) > 1 or stack[0].level != entry.level
        if within and not self._is_outermost(entry, thread, output):
            return
        context = self._busy[thread][0].context
        if output is None:
            context.failed = True
        seen = context.recorded or len(log.items) != log.waiting
        joined = seen and self.calls.flush(thread, innermost=True)
        self._busy.pop(thread, None)
        if ranges.opened:
            ranges.end(thread)
        if graphs_write:
            self.graphs.rings.end_on_host()
        self._in_graph.on_host = False
        if joined:
            self.recorder.end_forward()
        if context.recorded:
            if graphs_write:  # graphs keep the context for longer
                context.padding_T = None
            elif not (context.failed or context.recomputed):
                self.missing.look(context.reached)
            log.note = self.calls.checks.note
            if levels.unsettled:
                self.calls.finish_waiting()
                levels.settle_blocks()
        else:
            ranges.quiet.discard(thread)
        levels.wanted.pop(thread, None)  # hooks change when the next one begins
        if not self._busy:
            ranges.wanted = None
            if levels.stale:
                levels.settle()

    def _is_outermost(self, entry: ModelEntry, thread: int, output: Any) -> bool:
        """Leave a module; return whether it is the outermost one of the thread, whose forward is over."""
        stack = self._busy.get(thread, [])
        while stack and stack[-1].level > entry.level:  # left by an interruption that was caught inside
            stack.pop()
        if not stack:
            self._busy.pop(thread, None)
            return False
        if stack[-1].level != entry.level:
            return False
        if len(stack) == 1:
            return True
        context = stack[-1].context
        if output is None:
            context.failed = True
        if context.recorded and stack[-2].context is not context:
            self.calls.flush(thread, innermost=True)
        stack.pop()
        return False
