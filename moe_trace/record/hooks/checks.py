"""Inspect events outside small forwards: outside any forward, in a backward, in a large forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from moe_trace.find.private.torch_names import after_backward, graph_task_id, is_exporting
from moe_trace.find.routers import RouterSite
from moe_trace.record.forward.context import ForwardContext, ForwardStack
from moe_trace.record.forward.isolation import apart
from moe_trace.record.graphs.memory import captures_now
from moe_trace.record.hooks.events import (
    BEGIN,
    CONTEXT,
    EXPERTS,
    KINDS,
    ROUTER,
    WATCHED,
    WIDTH,
    EventLog,
    event_code,
)
from moe_trace.record.hooks.site import SiteHooks

_EVENTS_MAX = 256  # outside a forward of the model, whose end would join them
KEPT_BYTES_MAX = 64 * 2**20  # of the tensors in events, inside a forward


class EventChecks:
    """Recorder of events that has them joined before they keep too much memory alive.

    Args:
        outside: returns the context of a router call outside any forward of the model.
        join_passed: joins the calls that appear complete.
        end_backward: called at the end of the current backward pass, which recomputes calls of a forward.
    """

    def __init__(
        self,
        log: EventLog,
        forwards: ForwardStack,
        routers: Sequence[SiteHooks],
        *,
        outside: Callable[[], ForwardContext],
        join_passed: Callable[[], None],
        end_backward: Callable[[], None],
    ) -> None:
        self._kept_bytes = 0
        """Size of the tensors in events that are not joined."""
        self._awaits_backward = False
        self.has_looked = False
        """Whether any event that is not joined was inspected."""
        self._native_ids: dict[int, int] = {}
        self._log, self._forwards, self._routers = log, forwards, routers
        self._outside, self._join_passed, self._end_backward = outside, join_passed, end_backward

    def start_again(self) -> None:
        """Reset, because noted events are being joined. (After a failed backward, no callback runs.)"""
        self._kept_bytes, self._awaits_backward, self.has_looked = 0, False, False

    def note(self, event: Sequence[Any]) -> None:
        if is_exporting():
            return  # builds a program, calls nothing
        with suppress(Exception):  # joining it will find and count what is wrong
            event = self._prepare(event)
        self._log.items.extend(event)

    def _prepare(self, event: Sequence[Any]) -> Sequence[Any]:
        self.has_looked = True
        (site, kind), thread = divmod(event[0], KINDS), event[1]
        if kind == BEGIN:
            noted = len(self._log.items) - self._log.waiting
            if noted > WIDTH * _EVENTS_MAX or self._kept_bytes > KEPT_BYTES_MAX:
                self._join_passed()
            self._native_ids[thread] = threading.get_native_id()
            if self._forwards.of(thread) is not None:
                return event
            if captures_now() and self._is_captured(site, event[3]):
                return ()
            return (event_code(CONTEXT, site), thread, self._outside(), None, None, *event)
        if kind not in (ROUTER, WATCHED, EXPERTS):
            return event
        if graph_task_id() != -1:
            # If kept until the backward pass ends, it would keep the activations of a recomputed layer alive.
            with apart():
                event = (event[0], thread, *map(_detached, event[2:]))
            if kind == EXPERTS:
                event = (*event[:4], (*(event[4] or (None, None)), True))
            if not self._awaits_backward:
                self._awaits_backward = True
                after_backward(self._end_backward)  # if unavailable, the next forward ends it
        self._kept_bytes += sum(map(_bytes, event[2:]))
        return event

    def _is_captured(self, site: int, args: Any) -> bool:
        """Restart a call on a captured stream that began as an eager one; return whether it did.

        It does if CUDA was not used when its hooks were installed.
        """
        router = self._routers[site]
        was_known = router.on_cuda
        for other in self._routers:
            other.look_at_device()
        if was_known or not router.on_cuda:
            return False
        router.before_router(router.site.router, args or ())
        return True

    def native_id(self, thread: int, context: ForwardContext) -> int:
        """Return the native id of a thread, which may be assisting the forward's own."""
        if thread not in self._native_ids:
            alive = {t.ident: t.native_id for t in threading.enumerate()}
            return alive.get(thread) or context.thread
        return self._native_ids[thread]


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return tuple(map(_detached, value)) if type(value) is tuple else value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if type(value) is tuple else 0


def bytes_of_token(site: RouterSite) -> float:
    """Return bytes per token that a router keeps until the forward ends: usually logits, index, weights."""
    if not site.contract.reads_late:  # its arguments are kept too
        return float("inf")
    return 4.0 * site.info.num_experts + 12.0 * site.info.top_k
