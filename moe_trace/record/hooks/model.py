"""All hooks of one tracer: its routers', and the model's own, which tell where a forward begins and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_trace.data.schema import Stage, range_name
from moe_trace.find.private.torch_names import in_backward
from moe_trace.find.routers import RouterSite
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled import (
    called_through_compile,
    compiled_parts,
    is_capturing,
    run_hooks_in_python,
)
from moe_trace.record.graphs.forwards import HostForward
from moe_trace.record.graphs.recorder import GraphRecorder
from moe_trace.record.graphs.ring import STAGES
from moe_trace.record.hooks.copies import HoldsHooks, is_copy
from moe_trace.record.hooks.forwards import ForwardContext, ForwardStack, ModelInputs, unwrapped
from moe_trace.record.hooks.levels import HookLevels
from moe_trace.record.hooks.ranges import OpenRanges, owns_ranges, profiler_is_recording
from moe_trace.record.hooks.site import CallClock, Level, SiteHooks
from moe_trace.record.parallel.sending import Sending
from moe_trace.record.recorder import Recorder
from moe_trace.record.steps import Steps


class ModelHooks(HoldsHooks):
    """Put on, run and take off the hooks on a model and its routers.

    Args:
        steps: which step a forward belongs to, and whether it is recorded.
        graphs: where decisions go that are made inside compiled code or a CUDA graph.
        captures: notes where routers stand in a graph that is captured by hand.
        clock: times routers and experts by another clock too.
        sending: tells from the arguments of the experts what a call moves between processes.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        *,
        steps: Steps,
        recorder: Recorder,
        graphs: GraphRecorder,
        captures: CaptureNotes,
        clock: CallClock | None,
        sending: Callable[[Any], Sending | None],
    ) -> None:
        self.model = model
        self.forwards_recorded = 0
        self.padding_unknown = 0
        self._steps = steps
        self._recorder = recorder
        self._graphs = graphs
        self._graph_range = range_name("graph", type(unwrapped(model)).__name__)
        self._ranges = OpenRanges()
        self.routers = [
            SiteHooks(
                site,
                recorder=recorder,
                ranges=self._ranges,
                context=self.current_context,
                owner=self,
                rings=rings,
                captures=captures,
                clock=clock,
                sending=sending,
            )
            for site, rings in zip(sites, graphs.rings.sites, strict=True)
        ]
        self._levels = HookLevels(self.routers)
        self._handles: list[RemovableHandle] = []
        self._forwards = ForwardStack()
        self._inputs = ModelInputs(model)

    def put_on(self, *, recording: bool) -> None:
        """Install all hooks.

        Args:
            recording: whether the step under way is recorded. The model's own hook asks again at its next
                forward; a caller of a submodule never gets there.
        """
        run_hooks_in_python([ModelHooks._before_model, ModelHooks._after_model, *SiteHooks.functions()])
        if compiled_parts(self.model):
            self.graph_started()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after_model, always_call=True),
        ]
        self._levels.set(Level.RANGES if recording else Level.OFF)

    def take_off(self) -> None:
        """Remove all hooks and close every range; router calls under way are recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._levels.take_off()
        for hooks in self.routers:
            hooks.finish()
        self._ranges.close_all()
        self._forwards.clear()

    def abandon_calls(self) -> None:
        """Forget router calls that an exception interrupted on this thread."""
        for hooks in self.routers:
            if hooks.open_calls:
                hooks.discard()

    def graph_started(self) -> None:
        """Some of the model is compiled or captured with the hooks in it. Runs while it is being traced."""
        self._recorder.may_wait = False  # a graph's next replay overwrites the tensors that it returned
        self._levels.keep()

    def current_context(self) -> ForwardContext:
        """What is known of the forward that the calling thread is in."""
        context = self._forwards.current()
        if context is None:  # a submodule called on its own, or a replica's thread
            stage: Stage = "train" if torch.is_grad_enabled() and self.model.training else "prefill"
            step = self._steps.now()
            context = ForwardContext(
                step,
                stage,
                epoch=self._graphs.forwards.epoch,
                recorded=self._steps.samples(step),
                of_model=False,
            )
        return context

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._graphs.rings.start_in_graph(STAGES.index(self._inputs.stage(args, kwargs)))
            return
        if is_copy(module, self.model):
            return
        if is_capturing():
            self._levels.set(Level.RANGES)  # which tells where the experts end
            self._graphs.rings.start_captured(STAGES.index(self._inputs.stage(args, kwargs)))
            return
        self._ranges.close_thread()  # left open by an interruption that no hook saw, such as Ctrl-C
        self.abandon_calls()
        self._recorder.end_forward()  # recomputed calls of the backward before
        if in_backward() and (again := self._forwards.current()) is not None:
            # Checkpointed as a whole: the backward runs it again, which is no step and no forward of its own.
            self._forwards.enter(again)
            self._levels.want(self._level_needed(again.recorded))
            return
        step = self._steps.now()
        self._steps.forwards += 1
        sampled, profiled = self._steps.samples(step), profiler_is_recording()
        if profiled and sampled and (self._graphs.writes or self._levels.kept):
            self._open_graph_range()
        stage = self._inputs.stage(args, kwargs)
        now_ns, thread = time.time_ns(), threading.get_native_id()
        self._graphs.start_on_host(HostForward(step, stage, now_ns, thread, profiled, sampled))
        context = ForwardContext(step, stage, epoch=self._graphs.forwards.epoch, recorded=sampled)
        self._forwards.enter(context)
        if not self._levels.kept and self._is_compiled():
            self.graph_started()  # else code compiled in a step left out, or before a profile, lacks hooks
        self._levels.want(self._level_needed(sampled))
        if not sampled:
            return
        self.forwards_recorded += 1
        context.padding_T, unknown = self._inputs.padding(args, kwargs)
        self.padding_unknown += unknown

    def _is_compiled(self) -> bool:
        first = self._steps.forwards == 1  # parts may have been compiled since the start
        return called_through_compile() or (first and bool(compiled_parts(self.model)))

    @staticmethod
    def _level_needed(sampled: bool) -> Level:
        if not sampled:
            return Level.OFF
        return Level.RANGES if profiler_is_recording() else Level.RECORD

    def _open_graph_range(self) -> None:
        """Round the forward: where compiled code and the launches of its graphs stand in a trace."""
        if owns_ranges(self.routers[0].site.router, self):
            self._ranges.open(self._graph_range)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._graphs.rings.end_in_graph()
            return
        if is_copy(module, self.model):
            return
        self._graphs.rings.end_in_graph()
        if output is None:
            self.abandon_calls()
        else:
            for hooks in self.routers:
                if hooks.open_calls:
                    hooks.finish()
        if self._ranges.stacks:
            self._ranges.close(self._graph_range)
        if not is_capturing():
            self._recorder.end_forward()
        if self._forwards.leave():
            self._levels.leave()
