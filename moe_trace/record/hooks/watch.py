"""Where a forward of the model begins and ends, on the host and in graphs, and what it needs hooked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from moe_trace.data.schema import Stage, range_name
from moe_trace.find.contracts.modules import unwrapped
from moe_trace.find.private.torch_names import in_backward, is_jit_tracing
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.forward.context import ForwardContext, ForwardStack
from moe_trace.record.forward.guard import apart, warn_user
from moe_trace.record.forward.missing import MissingSites
from moe_trace.record.forward.ranges import (
    OpenRanges,
    any_profiler_is_recording,
    owns_ranges,
    profiler_is_recording,
)
from moe_trace.record.forward.steps import Steps
from moe_trace.record.graphs.compiled import compiled_parts, is_called_through_compile
from moe_trace.record.graphs.forwards import HostForward
from moe_trace.record.graphs.memory import captures_now
from moe_trace.record.graphs.recorder import GraphRecorder
from moe_trace.record.graphs.ring import STAGES
from moe_trace.record.hooks.calls import KEPT_BYTES_MAX, CallCollector
from moe_trace.record.hooks.entries import ModelEntry
from moe_trace.record.hooks.events import EventLog
from moe_trace.record.hooks.levels import HookLevels
from moe_trace.record.hooks.site import Level, SiteHooks


@dataclass(eq=False)
class ForwardWatch:
    """Told by the hooks on the modules that a model is entered through."""

    model: nn.Module
    routers: list[SiteHooks]
    steps: Steps
    recorder: Recorder
    graphs: GraphRecorder
    ranges: OpenRanges
    levels: HookLevels
    log: EventLog
    owner: object
    """Claims the routers' ranges."""
    forwards: ForwardStack = field(default_factory=ForwardStack)
    forwards_recorded: int = 0
    padding_unknown: int = 0
    broken: str | None = None
    """What went wrong in a hook of ours, the first time."""

    def __post_init__(self) -> None:
        sites = [router.site for router in self.routers]
        self.missing = MissingSites(self.model, sites)
        self._graph_range = range_name("graph", type(unwrapped(self.model)).__name__)
        self._append: Any = None
        self._token_bytes = sum(map(_bytes_of_token, sites))
        self.calls: CallCollector

    def abandon(self, thread: int) -> None:
        """Forget router calls that an exception interrupted on a thread."""
        self.guarded(self.calls.forget, thread)
        self.forwards.drop(thread)

    def graph_started(self) -> None:
        """Some of the model is compiled or captured. Runs while it is being traced or captured."""
        self.recorder.may_defer = False  # a graph's next replay overwrites the tensors that it returned
        if is_compiling() or not captures_now():
            self.levels.keep()  # what is captured holds none of the hooks' Python

    def guarded(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Nothing of ours raises into the user's forward."""
        try:
            function(*arguments)
        except Exception as error:
            if self.broken is None:
                self.broken = f"{type(error).__name__}: {error}"
                warn_user(
                    f"a hook of moe_trace failed ({self.broken}); the model runs on, its routing is lost"
                )

    def outside(self) -> ForwardContext:
        """What is known of a router called outside any forward: a submodule on its own."""
        stage: Stage = "train" if torch.is_grad_enabled() and self.model.training else "prefill"
        step = self.steps.now()
        return ForwardContext(
            step,
            stage,
            epoch=self.graphs.forwards.epoch,
            recorded=self.steps.samples(step),
            of_model=False,
            profiled=any_profiler_is_recording(),
        )

    # -- a forward ------------------------------------------------------------------------------------

    def begin(self, entry: ModelEntry, args: Any, kwargs: dict[str, Any], replica: bool) -> None:
        """A module that the model may be entered through is called."""
        if is_compiling():
            self.graphs.rings.start_in_graph(STAGES.index(entry.inputs.stage(args, kwargs)), entry.level)
        else:
            self.guarded(self._begin_eagerly, entry, args, kwargs, replica)

    def _begin_eagerly(self, entry: ModelEntry, args: Any, kwargs: dict[str, Any], replica: bool) -> None:
        if captures_now():
            self.levels.set(Level.RANGES)  # which tells where the experts end
            self.graphs.rings.start_captured(STAGES.index(entry.inputs.stage(args, kwargs)), entry.level)
            return
        thread = threading.get_ident()
        if self.forwards.is_stale(thread, entry.level) and not in_backward():
            self.abandon(thread)  # left by an interruption that no hook saw, such as Ctrl-C
        around = self.forwards.top(thread)
        if around is None:
            whole = self.forwards.of(thread) if replica else None
            if whole is None:
                self._begin_forward(entry, thread, args, kwargs)
            else:  # DataParallel runs a part of the batch on a thread of its own
                self.forwards.push(thread, entry.level, self._of_replica(entry, whole, args, kwargs))
            return
        around.inside += 1
        context = around.context
        if context.recorded and not context.recomputed and not (context.told and around.inside == 1):
            context = self._begin_inside(entry, thread, context, args, kwargs)
        self.forwards.push(thread, entry.level, context)

    def _begin_forward(self, entry: ModelEntry, thread: int, args: Any, kwargs: dict[str, Any]) -> None:
        if self.ranges.stacks:
            self.ranges.close_thread()
        self.calls.flush(None)  # what was called outside any forward
        self.recorder.end_forward()
        again = self.forwards.last
        if again is not None and in_backward():
            # Checkpointed as a whole: the backward runs it again, which is no step and no forward of its own.
            context = again.again()
            self.forwards.push(thread, entry.level, context)
            self._want(context)
            return
        step = self.steps.now()
        self.steps.forwards += 1
        # What torch.jit traces becomes part of somebody's program: nothing of ours may.
        sampled = self.steps.samples(step) and not is_jit_tracing()
        profiled = sampled and any_profiler_is_recording()
        if profiled and (self.graphs.writes or self.levels.kept) and profiler_is_recording():
            self._open_graph_range()
        stage = entry.inputs.stage(args, kwargs)
        context = ForwardContext(step, stage, recorded=sampled, profiled=profiled)
        self.graphs.start_on_host(HostForward(step, stage, time.time_ns(), context.thread, profiled, sampled))
        context.epoch = self.graphs.forwards.epoch
        self.forwards.push(thread, entry.level, context)
        if not self.levels.kept and self._is_compiled():
            self.graph_started()  # else code compiled in a step left out, or before a profile, lacks hooks
        self._want(context)
        if sampled:
            self.forwards_recorded += 1
            self._tell(context, entry, args, kwargs)
            self.send_events(entry.inputs.tokens(args, kwargs))

    def _open_graph_range(self) -> None:
        """Round the forward: where compiled code and the launches of its graphs stand in a trace."""
        if owns_ranges(self.routers[0].site.router, self.owner):
            self.ranges.wanted = True
            self.ranges.open(self._graph_range)

    def _begin_inside(
        self, entry: ModelEntry, thread: int, context: ForwardContext, args: Any, kwargs: dict[str, Any]
    ) -> ForwardContext:
        """A module inside another one that did not tell, or that calls several: it has inputs of its own."""
        if entry.inputs.length(args, kwargs) is None:
            return context
        stage = entry.inputs.stage(args, kwargs)
        if context.told:
            self.calls.flush(thread)
            context = context.inner(stage, None)
            now_ns = time.time_ns()
            self.graphs.start_on_host(
                HostForward(context.step, stage, now_ns, context.thread, context.profiled, True)
            )
            context.epoch = self.graphs.forwards.epoch
        context.stage = stage
        self.graphs.forwards.tell_stage(stage)
        self._tell(context, entry, args, kwargs)
        self.send_events(entry.inputs.tokens(args, kwargs))
        return context

    def _of_replica(
        self, entry: ModelEntry, whole: ForwardContext, args: Any, kwargs: dict[str, Any]
    ) -> ForwardContext:
        context = whole.here()
        if context.recorded:
            self._tell(context, entry, args, kwargs)
        return context

    def _tell(self, context: ForwardContext, entry: ModelEntry, args: Any, kwargs: dict[str, Any]) -> None:
        context.told = entry.inputs.length(args, kwargs) is not None
        try:
            with apart():
                context.padding_T, unknown = entry.inputs.padding(args, kwargs)
        except Exception:  # a mask of a kind that nobody thought of
            unknown = True
        self.padding_unknown += unknown and not context.padding_unclear
        context.padding_unclear |= unknown

    def _is_compiled(self) -> bool:
        first = self.steps.forwards == 1  # parts may have been compiled since the start
        return is_called_through_compile() or (first and bool(compiled_parts(self.model)))

    def _want(self, context: ForwardContext) -> None:
        """Put on what the calling thread's forward needs."""
        thread = threading.get_ident()
        if not context.recorded:
            self.ranges.quiet.add(thread)
            self.levels.want(Level.OFF)
            return
        self.ranges.quiet.discard(thread)
        ranges = context.profiled and profiler_is_recording()
        self.ranges.wanted = True if ranges else (None if self.ranges.wanted else False)
        self.levels.want(Level.RANGES if ranges else Level.RECORD)

    def send_events(self, tokens: int | None = None) -> None:
        """Where events go: straight into the list in a forward that is known to be small."""
        alone = tokens is not None and len(self.forwards.threads()) == 1
        straight = alone and tokens * self._token_bytes <= KEPT_BYTES_MAX  # type: ignore[operator]
        append = self.log.events.append if straight else self.calls.look_and_append
        if append == self._append:
            return
        self._append = append
        for router in self.routers:
            router.append = append

    def end(self, entry: ModelEntry, output: Any) -> None:
        if is_compiling():
            self.graphs.rings.end_in_graph(entry.level)
        else:
            self.guarded(self._end_eagerly, entry, output)

    def _end_eagerly(self, entry: ModelEntry, output: Any) -> None:
        self.graphs.rings.end_in_graph(entry.level)
        if captures_now():
            return
        thread = threading.get_ident()
        top = self.forwards.top(thread)
        while top is not None and top.level > entry.level:  # left by an interruption that was caught inside
            self.forwards.pop(thread)
            top = self.forwards.top(thread)
        if top is None or top.level != entry.level:
            return
        context = top.context
        if output is None:
            context.failed = True
        left_all = self.forwards.is_outermost(thread)
        if left_all or (context.recorded and self.forwards.is_inner(thread)):
            self.calls.flush(thread)
        self.forwards.pop(thread)
        if left_all:
            self._end_forward(context, thread)

    def _end_forward(self, context: ForwardContext, thread: int) -> None:
        if self.ranges.stacks:
            self.ranges.close(self._graph_range)
        self.graphs.rings.end_on_host()
        if context.recorded:
            self.recorder.end_forward()
            if not (context.failed or context.recomputed or self.graphs.writes):
                self.missing.look(context.reached)
            self.send_events()
            for router, counts in zip(self.routers, self.calls.counts, strict=True):
                if router.observe_block or router.reads_block:
                    router.settle(calls=counts.seen, fused=counts.fused)
        self.ranges.quiet.discard(thread)
        if not self.forwards.threads():
            self.ranges.wanted = None
        self.levels.leave()
        self.levels.settle()


def _bytes_of_token(site: RouterSite) -> float:
    """What a router keeps of a token until the forward ends: logits, index, weights as they mostly are."""
    if not site.contract.reads_late:  # its arguments too
        return float("inf")
    return 4.0 * site.info.num_experts + 12.0 * site.info.top_k
