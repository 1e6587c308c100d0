"""The hooks on one router, its experts and its block: they read the clock, keep references, open ranges.

They do no arithmetic, never wait for the device, and never raise inside the user's forward: a router that
cannot be read is switched off, warned about once, and counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from threading import get_ident, get_native_id
from time import time_ns
from typing import Any, Protocol

from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from moe_trace.data.schema import RangeKind, RouterInfo, range_name
from moe_trace.find.contracts import Call, ContractMismatch, Reading
from moe_trace.find.private.torch_names import in_backward
from moe_trace.find.routers import RouterSite
from moe_trace.record.call import CallRecord, let_graph_go
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled import give_stable_id
from moe_trace.record.graphs.hooks import TracedSite
from moe_trace.record.graphs.memory import captures_now
from moe_trace.record.graphs.rings import SiteRings
from moe_trace.record.hooks.copies import HoldsHooks, is_copy
from moe_trace.record.hooks.forwards import ForwardContext
from moe_trace.record.hooks.ranges import (
    OpenRanges,
    claim_ranges,
    owns_ranges,
    profiler_is_recording,
    release_ranges,
)
from moe_trace.record.parallel.sending import Sending
from moe_trace.record.recorder import Recorder

_FUSED_NOTE = (
    "its block ran fused, without calling router or experts: the decision was computed again from the "
    "block's input and the router's weights, and the router has no latency of its own"
)


class Level(IntEnum):
    """How much is hooked now."""

    OFF = 0
    RECORD = 1
    """Router and experts: decisions and host times."""
    RANGES = 2
    """The block too, and ranges while a profiler records."""


class CallClock(Protocol):
    """Times a router's module and its experts beside the host's clock; must not wait for the device."""

    def start(self, args: tuple[Any, ...]) -> Any:
        """Called just before the module runs, with its arguments; returns a mark."""

    def stop(self, mark: Any) -> None:
        """Called just after it ran."""

    def keep(self, name: str, call: int, kind: RangeKind, mark: Any) -> None:
        """The mark belongs to this recorded call. A mark that is never kept timed no recorded call."""


@dataclass(slots=True)
class _OpenCall(Call):
    """A call under way: what its contract reads, and when it ran."""

    profiled: bool = False
    ranged: bool = False
    """Whether its range was opened."""
    start_ns: int = 0
    end_ns: int = 0
    mark: Any = None
    captured: bool = False
    """In a CUDA graph, by hand."""


class SiteHooks(HoldsHooks):
    """Install, run and remove the hooks of one site.

    Args:
        context: returns the calling thread's `ForwardContext`.
        owner: the tracer, for the claim on the router's ranges.
        rings: where decisions go that are made inside compiled code or a CUDA graph.
        captures: notes where router and experts stand in a graph that is captured by hand.
        clock: times router and experts by another clock too.
        sending: tells from the arguments of the experts what the call moves between processes.
    """

    def __init__(
        self,
        site: RouterSite,
        *,
        recorder: Recorder,
        ranges: OpenRanges,
        context: Callable[[], ForwardContext],
        owner: object,
        rings: SiteRings,
        captures: CaptureNotes,
        clock: CallClock | None = None,
        sending: Callable[[Any], Sending | None] = lambda args: None,
    ) -> None:
        self.site = site
        self.calls = 0
        self.misread: str | None = None
        self.level = Level.OFF
        self.fused_calls = 0
        self.muted = False
        """Hooked, because compiled code has the hooks in it, but not to be recorded now."""
        self._traced = TracedSite(site, rings)
        self._captures = captures
        self._recorder = recorder
        self._ranges = ranges
        self._context = context
        self._owner = owner
        self._clock = clock
        self._sending = sending
        self._read = site.read
        self._fused: dict[int, tuple[Any, int]] | None = None if site.read_block is None else {}
        """By thread: arguments and start (ns) of a block whose router has not been called yet."""
        self._expert_marks: dict[int, tuple[int, Any]] = {}
        self._captured_experts: set[int] = set()
        self._names = {kind: range_name(kind, site.site) for kind in ("router", "experts", "block")}
        self._handles: list[RemovableHandle] = []
        self.open_calls: dict[int, _OpenCall] = {}

    @property
    def info(self) -> RouterInfo:
        """What is known of the router, with what only its calls could tell."""
        info = self.site.info
        return replace(info, notes=(*info.notes, _FUSED_NOTE)) if self.fused_calls else info

    @classmethod
    def functions(cls) -> list[Callable[..., Any]]:
        """All hooks that are ever put on a module."""
        return [
            cls._before_block,
            cls._after_block,
            cls._before_router,
            cls._after_router,
            cls._after_watched,
            cls._before_experts,
            cls._after_experts,
        ]

    def set_level(self, level: Level) -> None:
        """Install what `level` needs; cheap when nothing changes."""
        if self.misread is not None:
            level = Level.OFF
        if level == self.level:
            return
        self._remove()
        self.level = level
        if level == Level.OFF:
            return
        claim_ranges(self.site.router, self._owner)
        self._install(level)
        for handle in self._handles:
            give_stable_id(handle)

    def _install(self, level: Level) -> None:
        site, handles = self.site, self._handles
        if site.block is not None and (level == Level.RANGES or site.read_block is not None):
            handles.append(site.block.register_forward_pre_hook(self._before_block))
            handles.append(site.block.register_forward_hook(self._after_block, always_call=True))
        handles.append(site.router.register_forward_pre_hook(self._before_router))
        handles.append(site.router.register_forward_hook(self._after_router, always_call=True))
        if site.watched is not None:
            handles.append(site.watched.register_forward_hook(self._after_watched))
        if site.experts is not None:
            handles.append(site.experts.register_forward_pre_hook(self._before_experts, with_kwargs=True))
            if site.times_experts and (level == Level.RANGES or self._clock is not None):
                handles.append(site.experts.register_forward_hook(self._after_experts, always_call=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        release_ranges(self.site.router, self._owner)

    def finish(self) -> None:
        """Record the calling thread's call whose experts module was never reached (fused blocks)."""
        opened = self.open_calls.get(get_ident())
        if opened is not None and opened.router_output is not None:
            self._finish(get_ident())

    def discard(self) -> None:
        """Forget the calling thread's call under way: its forward was interrupted."""
        self.open_calls.pop(get_ident(), None)

    # -- hooks ----------------------------------------------------------------------------------------

    def _opens_ranges(self) -> bool:
        return (
            self.level == Level.RANGES
            and not self.muted
            and profiler_is_recording()
            and owns_ranges(self.site.router, self._owner)
            and self._context().recorded
        )

    def _before_block(self, module: nn.Module, args: Any) -> None:
        if is_compiling():
            self._traced.before_block()
            return
        if is_copy(module, self.site.block):
            return
        if self._opens_ranges():
            self._ranges.open(self._names["block"])
        if self._fused is not None:
            self._fused[get_ident()] = args, time_ns()

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            self._traced.after_block(args, output)
            return
        thread = get_ident()
        if output is None:
            self.open_calls.pop(thread, None)
        elif thread in self.open_calls:
            self._finish(thread)
        elif self._fused is not None and thread in self._fused:
            self._finish_fused(*self._fused.pop(thread), output)
        self._ranges.close(self._names["block"])

    # The next three run in every call of every router, so they are written for the fewest steps.

    def _before_router(self, module: nn.Module, args: Any) -> None:
        if is_compiling():
            self._traced.before_router(args)
            return
        if self.muted or is_copy(module, self.site.router):
            return
        thread = get_ident()
        before = self.open_calls.get(thread)
        if before is not None and before.router_output is not None:
            self._finish(thread)  # a fused block called its router before, but no experts
        if self._fused is not None:
            self._fused.pop(thread, None)
        opened = self.open_calls[thread] = _OpenCall(args)
        opened.profiled = profiler_is_recording()
        if opened.profiled and self._opens_ranges():
            opened.ranged = True
            self._ranges.open(self._names["router"])
        opened.start_ns = time_ns()
        if self._clock is not None:
            opened.mark = self._clock.start(args)
        if captures_now():
            opened.captured = True
            self._captures.begin(self.site.name, self.site.site, "router")

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            self._traced.after_router(output)
            return
        thread = get_ident()
        opened = self.open_calls.get(thread)
        if opened is not None:
            if opened.captured:
                self._captures.end(self.site.name, "router")
            if self._clock is not None:
                self._clock.stop(opened.mark)
            opened.end_ns = time_ns()
        if self._ranges.stacks:
            self._ranges.close(self._names["router"])
        if opened is None:
            return
        if output is None:  # the router raised, or a recomputation was cut short: no decision was made
            del self.open_calls[thread]
            return
        opened.router_output = output
        if self.site.experts is None:
            self._finish(thread)

    def _after_watched(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            self._traced.after_watched(output)
            return
        opened = self.open_calls.get(get_ident())
        if opened is not None:
            opened.watched_output = output

    def _before_experts(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        # Without kwargs: taken off by another thread after torch had begun to call the module's hooks.
        if is_compiling():
            self._traced.before_experts(args, kwargs or {})
            return
        thread = get_ident()
        opened = self.open_calls.get(thread)
        if opened is not None:
            if opened.ranged and self.site.times_experts:
                self._ranges.open(self._names["experts"])
            opened.experts_args = args
            opened.experts_kwargs = kwargs or {}
            self._finish(thread)
            if opened.captured and self.site.times_experts:
                self._captures.begin(self.site.name, self.site.site, "experts")
                self._captured_experts.add(thread)
            if self._clock is not None and self.misread is None and self.site.times_experts:
                self._expert_marks[thread] = (self.calls - 1, self._clock.start(args))

    def _after_experts(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            return
        thread = get_ident()
        if thread in self._captured_experts:
            self._captured_experts.remove(thread)
            self._captures.end(self.site.name, "experts")
        call, mark = self._expert_marks.pop(thread, (0, None))
        if self._clock is not None and mark is not None and output is not None:
            self._clock.stop(mark)
            self._clock.keep(self.site.name, call, "experts", mark)
        self._ranges.close(self._names["experts"])

    # -- recording ------------------------------------------------------------------------------------

    def _finish(self, thread: int) -> None:
        opened = self.open_calls.pop(thread)
        try:
            reading = self._read(opened)
        except ContractMismatch as mismatch:
            self._switch_off(str(mismatch))
            return
        if opened.captured:
            self._traced.rings.write_captured(reading)
            return
        if self._clock is not None:
            self._clock.keep(self.site.name, self.calls, "router", opened.mark)
        sending = self._sending(opened.experts_args)
        self._add(reading, opened.start_ns, opened.end_ns, opened.profiled, sending)

    def _finish_fused(self, args: Any, start_ns: int, output: Any) -> None:
        """Record a call of a block that called neither its router nor its experts."""
        assert self.site.read_block is not None
        try:
            reading = self.site.read_block(args, output)
        except ContractMismatch as mismatch:
            self._switch_off(str(mismatch))
            return
        if captures_now():
            self._traced.rings.write_captured(reading)
            return
        # The router has no time of its own: the sample stands at the block's start.
        self.fused_calls += 1
        self._add(reading, start_ns, start_ns, profiler_is_recording())

    def _add(
        self,
        reading: Reading,
        start_ns: int,
        end_ns: int,
        profiled: bool,
        sending: Sending | None = None,
    ) -> None:
        index_TK = reading.index_TK
        context = self._context()
        if not context.recorded:
            return
        recomputed = in_backward()
        if recomputed:
            # Kept until the next forward, each recomputed layer's graph would be taken apart there, while the
            # device waits for that forward's first kernel.
            let_graph_go(reading)
            self._recorder.end_with_backward()
        elif not context.of_model:
            let_graph_go(reading)  # no end of a forward will do it
        padding_T = context.padding_T
        if padding_T is not None and padding_T.shape[0] != index_TK.shape[0]:
            padding_T = None
        record = CallRecord(
            self.site,
            self.calls,
            context.step,
            "recompute" if recomputed else "forward",
            context.stage,
            start_ns,
            end_ns,
            get_native_id() if recomputed else context.thread,  # autograd has threads of its own
            profiled,
            padding_T,
            order=(context.epoch, 0),
            sending=sending,
        )
        self.calls += 1
        self._recorder.add(record, reading)

    def _switch_off(self, reason: str) -> None:
        self.misread = reason
        self._remove()
        self.level = Level.OFF
        warnings.warn(
            f"{self.site.name} ({self.site.info.router_class}) cannot be read as "
            f"'{self.site.contract.name}': {reason}. Its routing is no longer recorded; the model runs on",
            RuntimeWarning,
            stacklevel=2,
        )
