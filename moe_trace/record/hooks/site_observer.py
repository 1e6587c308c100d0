"""General hooks on one router, its experts and its block: they append to a list and open ranges.

They do no arithmetic, never wait for the device, and never raise. What is constant during a forward is not
checked in each call: other hooks are installed instead (`site.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from time import time_ns
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from moe_trace.data.schema import range_name
from moe_trace.find.private.module_calls import raised_before_forward
from moe_trace.find.private.torch_names import graph_task_id
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.inplace_outputs import TensorCopies
from moe_trace.record.forward.copied_models import HookOwner, detach_if_copy
from moe_trace.record.forward.isolation import apart
from moe_trace.record.forward.ranges import OpenRanges
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled_rings import SiteRings
from moe_trace.record.graphs.hooks import CapturedCalls, TracedSite
from moe_trace.record.graphs.memory import captures_now
from moe_trace.record.hooks.events import (
    BEGIN,
    BLOCK,
    BLOCK_END,
    EXPERTS,
    ROUTER,
    WATCHED,
    CallClock,
    EventLog,
    event_code,
)
from moe_trace.record.parallel.dispatch import DispatchInfo

MISSING: Any = object()
"""Marks an argument that torch did not pass to a hook."""


class SiteObserver(HookOwner):
    """The hooks of one site.

    Args:
        index: number of the site in the events.
        rings: destination of decisions made inside compiled code or a CUDA graph.
        captures: notes the position of router and experts in a graph that is captured by hand.
        clock: additional clock for router and experts.
    """

    ranged = False
    """Whether ranges are opened while a profiler records."""
    _of_block = (False, False)
    """(whether the block is observed, whether it is read); if neither, it only opens a range."""
    _times_experts = False
    """Whether a hook observes the start of the experts."""

    def __init__(
        self,
        site: RouterSite,
        index: int,
        *,
        ranges: OpenRanges,
        rings: SiteRings,
        captures: CaptureNotes,
        clock: CallClock | None,
        log: EventLog,
    ) -> None:
        self.site = site
        self.sending: Callable[[Any], DispatchInfo | None] | None = None
        """From the experts' arguments, returns what a call sends to other processes; None if alone."""
        self.copies: TensorCopies | None = TensorCopies()
        self._index = index
        self._log = log
        self._begin, self._router, self._watched, self._experts, self._block, self._block_end = (
            event_code(kind, index) for kind in (BEGIN, ROUTER, WATCHED, EXPERTS, BLOCK, BLOCK_END)
        )
        self.traced = TracedSite(site, rings)
        self.captured = CapturedCalls(site, rings, captures)
        self.capturing = self.captured.open
        """Not empty while a thread captures such a call."""
        self.on_cuda = False
        """Whether a stream that is captured by hand may contain its calls."""
        self._expert_marks: dict[int, Any] = {}
        self._ranges = ranges
        self._clock = clock
        self._keeps_arguments = not site.contract.reads_late
        self.range_names = tuple(range_name(kind, site.site) for kind in ("router", "experts", "block"))
        self._router_range, self._experts_range, self._block_range = self.range_names
        self.observe_block = site.experts is not None or bool(site.listed)
        """Whether the block is hooked for recording, until each router call is seen to have its experts."""
        self.irregular = site.shares_router
        """Whether the kind of a call is known from its block only, which then stays observed."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the block needs other hooks than those installed."""
        self._handles: list[RemovableHandle] = []

    def keep_block(self) -> None:
        """Keep the block observed: only it shows whether a call without experts ran fused."""
        self.irregular = True
        if not self.observe_block:
            self.observe_block = True
            self.on_change()

    def _in_block(self, thread: int) -> bool:
        kinds = (kind for kind, _ in self._log.last_first(self._index, thread))
        return next((kind for kind in kinds if kind in (BLOCK, BLOCK_END)), BLOCK_END) == BLOCK

    def time_captured_experts(self) -> None:
        """Hook the start of the experts, because the router is being captured into a graph by hand."""
        experts = self.site.experts
        if experts is not None and self.site.times_experts and not self._times_experts:
            self._times_experts = True
            self._handles.append(experts.register_forward_pre_hook(self.before_experts, prepend=True))

    # -- hooks: most calls take the shorter path of `fast_hooks.py` ---------------------------------------

    def _after_watched(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_dynamo_compiling():
            self.traced.after_watched(output)
            return
        if self.capturing and (captured := self.capturing.get(get_ident())) is not None:
            captured.after_watched(output)
            return
        if self.copies is not None:
            output = self.copies.copy(output)
        self._log.note((self._watched, get_ident(), output, None, None))

    def _trimmed(self, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the experts' arguments without those not needed for reading, copied if necessary."""
        args, kwargs = self._needed(args, kwargs)
        return (args, kwargs) if self.copies is None else self.copies.received(args, kwargs)

    def _needed(self, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._keeps_arguments:
            return args, kwargs
        return (None, *args[1:]), {k: (None if k == "hidden_states" else v) for k, v in kwargs.items()}

    def _before_copied(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        """Copy the arguments of the experts, after all other hooks."""
        if is_dynamo_compiling() or get_ident() in self.capturing or self.copies is None:
            return
        self.copies.receive(*self._needed(args, kwargs or {}))

    def _adopt_traced(self) -> None:
        """Record a router that ran inside compiled code, unlike its experts: it has no time of its own."""
        call = self.traced.take()
        if call is not None:
            now_ns, thread = time_ns(), get_ident()
            self._log.note((self._begin, thread, now_ns, None, None))
            output = call.router_output
            if self.copies is not None:
                output = self.copies.router_output(output)
            self._log.note((self._watched, thread, call.watched_output, None, None))
            self._log.note((self._router, thread, now_ns, output, graph_task_id()))

    def before_router(self, module: nn.Module, args: Any) -> None:
        if is_dynamo_compiling():
            self.traced.before_router(args)
            return
        if module is not self.site.router and detach_if_copy(module, self.site.router):
            return
        thread = get_ident()
        if self.capturing and self.captured.lose(thread):
            self.keep_block()
        if self.on_cuda and captures_now():
            self.time_captured_experts()
            self.captured.begin(thread, args, own=not self.site.shares_router or self._in_block(thread))
            return
        if self.ranged and (not self.site.shares_router or self._ranges.has(self._block_range, thread)):
            self._ranges.open(self._router_range, thread)
        mark = None if self._clock is None else self._clock.start(args)
        kept = args if self._keeps_arguments else None
        self._log.note((self._begin, thread, time_ns(), kept, mark))

    def after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_dynamo_compiling():
            self.traced.after_router(output)
            return
        if self.capturing and self.captured.end_router(get_ident(), output):
            return
        now_ns = time_ns()
        if self._clock is not None:
            noted = self._log.last_first(self._index, get_ident())
            mark = next((items[2] for kind, items in noted if kind == BEGIN), None)
            if mark is not None:
                self._clock.stop(mark)
        thread = get_ident()
        if self._ranges.opened:
            self._ranges.close(self._router_range, thread)
        if self.copies is not None:  # not part of the router's time
            output = self.copies.router_output(output)
        self._log.note((self._router, thread, now_ns, output, graph_task_id()))

    def before_experts(self, module: nn.Module, args: Any) -> None:
        if is_dynamo_compiling():
            return
        thread = get_ident()
        if self.capturing and self.captured.begin_experts(thread):
            return
        if self.ranged:
            self._ranges.open(self._experts_range, thread)
        if self._clock is not None:
            self._expert_marks[thread] = self._clock.start(args)

    def after_experts(self, module: nn.Module, args: Any, kwargs: Any, output: Any = MISSING) -> None:
        # `output` is missing if another thread removed the hook while torch was calling the hooks, which then
        # calls it like one without keyword arguments.
        keywords = {} if output is MISSING else kwargs
        if is_dynamo_compiling():
            self.traced.after_experts(args, keywords)
            return
        thread = get_ident()
        if self.capturing and self.captured.end_experts(thread, args, keywords):
            return
        if module is not self.site.experts and detach_if_copy(module, self.site.experts):
            return
        mark = None
        if self._clock is not None:
            mark = self._expert_marks.pop(thread, None)
            if mark is not None:
                self._clock.stop(mark)
        if self._ranges.opened:
            self._ranges.close(self._experts_range, thread)
        if output is None and raised_before_forward():
            self._log.note((self._experts, thread, None, None, None))
            return
        if self.traced.call is not None:
            self._adopt_traced()
        sending = None if self.sending is None else self.sending(args)
        args, keywords = self._trimmed(args, keywords)
        extras = None if sending is None and mark is None else (sending, mark)
        self._log.note((self._experts, thread, args, keywords, extras))

    def before_block(self, module: nn.Module, args: Any) -> None:
        if is_dynamo_compiling():
            self.traced.before_block()
            return
        if module is not self.site.block and detach_if_copy(module, self.site.block):
            return
        thread = get_ident()
        if self.ranged:
            self._ranges.open(self._block_range, thread)
        if True in self._of_block:
            self._log.note((self._block, thread, time_ns(), None, None))

    def after_block(self, module: nn.Module, args: Any, kwargs: Any, output: Any = MISSING) -> None:
        if output is MISSING:
            kwargs, output = {}, kwargs
        arguments = (*args, *kwargs.values())
        if is_dynamo_compiling():
            self.traced.after_block(arguments, output)
            return
        thread = get_ident()
        if self.capturing:
            self.captured.end_block(thread, arguments, output)
        if output is not None and True in self._of_block:
            reading = None if self.site.read_block is None else self._read_block(arguments, output)
            self._log.note((self._block_end, thread, reading, None, None))
        if self._ranges.opened:
            self._ranges.close(self._block_range, thread)

    def _read_block(self, args: tuple[Any, ...], output: Any) -> Any:
        """Return (start, reading or error, whether in a backward), or None if the router was called."""
        for kind, items in self._log.last_first(self._index, get_ident()):
            if kind == BEGIN:
                return None
            if kind == BLOCK:
                start_ns = items[0]
                break
        else:
            return None
        try:
            with apart():
                reading: Any = self.site.read_block(args, output)  # type: ignore[misc]
        except Exception as error:
            reading = error
        if captures_now():
            if not isinstance(reading, Exception):
                self.traced.rings.write_captured(reading)
            return None
        return start_ns, reading, graph_task_id() != -1
