"""Hooks for most calls of most routers: they append to a list, open ranges, and do nothing else.

Special cases are delegated to the general hooks (`site_observer.py`). The hooks of a site belong to a small
object of their own, because the model evicts it from the processor's caches between two calls.
"""

from __future__ import annotations

from threading import get_ident
from time import time_ns
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from moe_trace.find.private.torch_names import enter_private, graph_task_id, stream_is_captured
from moe_trace.record.forward.copied_models import HookOwner, detach_if_copy
from moe_trace.record.forward.ranges import OpenRanges
from moe_trace.record.hooks.events import BEGIN, EXPERTS, ROUTER, ROWS, EventLog, event_code
from moe_trace.record.hooks.site_observer import MISSING, SiteObserver


def _without_hidden(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop hidden states from the experts' arguments, to free their memory before the forward ends."""
    return None, *args[1:]


class PlainCalls(HookOwner):
    """Hooks of a site whose calls are timed by the host's clock only, and kept by reference.

    Args:
        general: hooks that handle all other calls.
        index: number of the site in the events.
    """

    def __init__(self, general: SiteObserver, index: int, log: EventLog) -> None:
        self.general, self.log = general, log
        self.router: nn.Module | None = None
        self.experts: nn.Module | None = None
        """Modules whose calls are handled here; None while all calls are delegated."""
        self.traced, self.capturing = general.traced, general.capturing
        self.on_cuda = False
        """Whether a call may be captured into a graph by hand, which is checked when the router begins."""
        self.begin_code, self.router_code, self.experts_code = (
            event_code(kind, index) for kind in (BEGIN, ROUTER, EXPERTS)
        )

    def start(self) -> None:
        """Start handling calls."""
        self.router, self.experts = self.general.site.router, self.general.site.experts

    def stop(self) -> None:
        """Stop handling calls, although the hooks may still be installed."""
        self.router = self.experts = None

    def before_router(self, module: nn.Module, args: Any) -> None:
        if (
            is_dynamo_compiling()
            or module is not self.router
            or self.capturing
            or (self.on_cuda and stream_is_captured())
        ):
            self.general.before_router(module, args)
        else:
            self.log.note((self.begin_code, get_ident(), time_ns(), None, None))

    def after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_dynamo_compiling() or module is not self.router or self.capturing:
            self.general.after_router(module, args, output)
        else:
            now_ns = time_ns()
            self.log.note((self.router_code, get_ident(), now_ns, output, graph_task_id()))

    def after_experts(self, module: nn.Module, args: Any, kwargs: Any, output: Any = MISSING) -> None:
        if (
            is_dynamo_compiling()
            or module is not self.experts
            or kwargs
            or output is None
            or output is MISSING
            or self.traced.call is not None
            or self.capturing
        ):
            self.general.after_experts(module, args, kwargs, output)
        else:
            # Usually (hidden states, index, weights), for which the general code takes five times as long.
            args = (None, args[1], args[2]) if len(args) == 3 else _without_hidden(args)
            self.log.note((self.experts_code, get_ident(), args, None, None))


class PlainRanges(PlainCalls):
    """Plain hooks while a profiler records: they open ranges on the thread of the profiled forward.

    Whether dynamo traces is checked first, because it cannot trace `get_ident`.
    """

    def __init__(self, general: SiteObserver, index: int, log: EventLog, ranges: OpenRanges) -> None:
        super().__init__(general, index, log)
        self.block: nn.Module | None = None
        self.ranges = ranges
        self.router_range, self.experts_range, self.block_range = general.range_names
        self.router_slot, self.experts_slot, self.block_slot = map(ranges.slot, general.range_names)

    def start(self) -> None:
        super().start()
        self.block = self.general.site.block

    def stop(self) -> None:
        super().stop()
        self.block = None

    def before_block(self, module: nn.Module, args: Any) -> None:
        ranges = self.ranges
        if is_dynamo_compiling() or module is not self.block or get_ident() != ranges.thread:
            self.general.before_block(module, args)
        else:
            own, slot = ranges.own, self.block_slot
            own[slot] = own[slot], enter_private(self.block_range)

    def after_block(self, module: nn.Module, args: Any, kwargs: Any, output: Any = MISSING) -> None:
        ranges = self.ranges
        if (
            is_dynamo_compiling()
            or module is not self.block
            or get_ident() != ranges.thread
            or not (opened := ranges.own[self.block_slot])
        ):
            self.general.after_block(module, args, kwargs, output)
        else:
            ranges.own[self.block_slot] = opened[0]

    def before_router(self, module: nn.Module, args: Any) -> None:
        ranges = self.ranges
        if (
            is_dynamo_compiling()
            or module is not self.router
            or get_ident() != ranges.thread
            or self.capturing
            or (self.on_cuda and stream_is_captured())
        ):
            self.general.before_router(module, args)
        else:
            own, slot = ranges.own, self.router_slot
            own[slot] = own[slot], enter_private(self.router_range)
            self.log.note((self.begin_code, ranges.thread, time_ns(), None, None))

    def after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        ranges = self.ranges
        if (
            is_dynamo_compiling()
            or module is not self.router
            or get_ident() != ranges.thread
            or not (opened := ranges.own[self.router_slot])
        ):
            self.general.after_router(module, args, output)
        else:
            now_ns = time_ns()
            ranges.own[self.router_slot] = opened[0]
            opened = None  # ends the range
            self.log.note((self.router_code, ranges.thread, now_ns, output, graph_task_id()))

    def before_experts(self, module: nn.Module, args: Any) -> None:
        ranges = self.ranges
        if (
            is_dynamo_compiling()
            or module is not self.experts
            or get_ident() != ranges.thread
            or self.capturing
        ):
            self.general.before_experts(module, args)
        else:
            own, slot = ranges.own, self.experts_slot
            own[slot] = own[slot], enter_private(self.experts_range)

    def after_experts(self, module: nn.Module, args: Any, kwargs: Any, output: Any = MISSING) -> None:
        ranges = self.ranges
        if (
            is_dynamo_compiling()
            or module is not self.experts
            or get_ident() != ranges.thread
            or kwargs
            or output is None
            or output is MISSING
            or self.traced.call is not None
            or self.capturing
            or not (opened := ranges.own[self.experts_slot])
        ):
            self.general.after_experts(module, args, kwargs, output)
        else:
            ranges.own[self.experts_slot] = opened[0]
            opened = None
            args = (None, args[1], args[2]) if len(args) == 3 else _without_hidden(args)
            self.log.note((self.experts_code, ranges.thread, args, None, None))


class ListedExpert(HookOwner):
    """Hook on one expert.

    Args:
        site: number of the router in the events.
        number: number of the expert among those of the router.
    """

    def __init__(self, expert: nn.Module, site: int, number: int, log: EventLog) -> None:
        self._expert, self._code, self._number, self._log = expert, event_code(ROWS, site), number, log

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        """Forward pre-hook that reads only shapes, which the host knows."""
        if is_dynamo_compiling():
            return
        if module is not self._expert and detach_if_copy(module, self._expert):
            return
        arguments = (*args, *(kwargs or {}).values())
        shape = next((value.shape for value in arguments if isinstance(value, Tensor)), None)
        if shape is not None:
            self._log.note((self._code, get_ident(), self._number, shape[:-1].numel(), None))
