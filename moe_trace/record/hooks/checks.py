"""Looks at each event where no end of a small forward is near: outside, in a backward, in a large one."""

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
KEPT_BYTES_MAX = 64 * 2**20  # of the tensors in them, inside a forward


class EventChecks:
    """Notes events, and has them joined before they keep too much alive.

    Args:
        outside: what is known of a router call outside any forward of the model.
        join_passed: joins what is complete by all signs.
        end_backward: called when the backward under way is over, which recomputes what a forward called.
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
        """Of the tensors in events that are not joined."""
        self._awaits_backward = False
        self.has_looked = False
        """Whether any of the events that are not joined was looked at."""
        self._natives: dict[int, int] = {}
        self._log, self._forwards, self._routers = log, forwards, routers
        self._outside, self._join_passed, self._end_backward = outside, join_passed, end_backward

    def start_again(self) -> None:
        """What was noted is being joined. (A backward that failed calls nobody.)"""
        self._kept_bytes, self._awaits_backward, self.has_looked = 0, False, False

    def note(self, event: Sequence[Any]) -> None:
        """Note an event."""
        if is_exporting():
            return  # a program, not a call
        with suppress(Exception):  # what it is will be found out, and counted, when it is joined
            event = self._looked_at(event)
        self._log.items.extend(event)

    def _looked_at(self, event: Sequence[Any]) -> Sequence[Any]:
        self.has_looked = True
        (site, kind), thread = divmod(event[0], KINDS), event[1]
        if kind == BEGIN:
            noted = len(self._log.items) - self._log.waiting
            if noted > WIDTH * _EVENTS_MAX or self._kept_bytes > KEPT_BYTES_MAX:
                self._join_passed()
            self._natives[thread] = threading.get_native_id()
            if self._forwards.of(thread) is not None:
                return event
            if captures_now() and self._is_captured(site, event[3]):
                return ()
            return (event_code(CONTEXT, site), thread, self._outside(), None, None, *event)
        if kind not in (ROUTER, WATCHED, EXPERTS):
            return event
        if graph_task_id() != -1:
            # Kept until the backward ends, it would keep the activations of a recomputed layer alive.
            with apart():
                event = (event[0], thread, *map(_detached, event[2:]))
            if kind == EXPERTS:
                event = (*event[:4], (*(event[4] or (None, None)), True))
            if not self._awaits_backward:
                self._awaits_backward = True
                after_backward(self._end_backward)  # else the next forward ends them
        self._kept_bytes += sum(map(_bytes, event[2:]))
        return event

    def _is_captured(self, site: int, args: Any) -> bool:
        """Whether a call on a captured stream began as an eager one, as CUDA was not used when its hooks were
        put on; then it begins again."""
        router = self._routers[site]
        was_known = router.on_cuda
        for one in self._routers:
            one.look_at_device()
        if was_known or not router.on_cuda:
            return False
        router.before_router(router.site.router, args or ())
        return True

    def native_id(self, thread: int, context: ForwardContext) -> int:
        """Of a thread that helps the forward's own."""
        if thread not in self._natives:
            alive = {t.ident: t.native_id for t in threading.enumerate()}
            return alive.get(thread) or context.thread
        return self._natives[thread]


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return tuple(map(_detached, value)) if type(value) is tuple else value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if type(value) is tuple else 0


def bytes_of_token(site: RouterSite) -> float:
    """What a router keeps of a token until the forward ends: logits, index, weights as they mostly are."""
    if not site.contract.reads_late:  # its arguments too
        return float("inf")
    return 4.0 * site.info.num_experts + 12.0 * site.info.top_k
