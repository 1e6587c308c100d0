"""From what the hooks saw to what is recorded: joins, reads, and accounts for every router call."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_trace.find.contracts import Call, ContractMismatch, Reading
from moe_trace.find.private.torch_names import after_backward, in_backward, is_exporting
from moe_trace.find.routers import transformers_release
from moe_trace.record.calls.call import CallRecord, detach
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.forward.context import ForwardContext, ForwardStack
from moe_trace.record.forward.guard import apart, warn_user
from moe_trace.record.hooks.events import BEGIN, EXPERTS, ROUTER, WATCHED, Event, EventLog
from moe_trace.record.hooks.joining import CallJoiner, RouterCall
from moe_trace.record.hooks.observe import CallClock
from moe_trace.record.hooks.site import SiteHooks

_EVENTS_MAX = 256  # outside a forward of the model, whose end would join them
KEPT_BYTES_MAX = 64 * 2**20  # of the tensors in them, inside a forward


@dataclass(slots=True)
class SiteCounts:
    """What became of the calls of one router."""

    seen: int = 0
    recorded: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """By reason (`LOST_CALLS` in `summary_notes.py`)."""
    misread: str | None = None
    """Why the first call that could not be read could not."""
    fused: int = 0
    """Calls of a block that called neither its router nor its experts."""


class CallCollector:
    """Takes the events of all threads and hands finished calls to the recorder.

    Args:
        outside: what is known of a router call outside any forward of the model.
    """

    def __init__(
        self,
        routers: Sequence[SiteHooks],
        *,
        log: EventLog,
        forwards: ForwardStack,
        outside: Callable[[], ForwardContext],
        recorder: Recorder,
        clock: CallClock | None,
    ) -> None:
        self.counts = [SiteCounts() for _ in routers]
        self.orphans = 0
        """Experts calls that belong to no router call."""
        self.padding_unclear = 0
        """Forwards whose blocks saw other tokens than the mask has."""
        self._routers = routers
        self._log = log
        self._forwards = forwards
        self._outside = outside
        self._recorder = recorder
        self._clock = clock
        self._joiner = CallJoiner(
            [router.site.experts is not None for router in routers],
            context_of=self._context_of,
            orphan=self._orphan,
        )
        self._lock = threading.RLock()
        self._natives: dict[int, int] = {}
        self._bytes = 0
        self._ends_with_backward = False

    # -- while the model runs -------------------------------------------------------------------------

    def look_and_append(self, event: Event) -> None:
        """Append an event outside a forward of the model, in a backward, or in a large forward."""
        if is_exporting():
            return  # a program, not a call
        with suppress(Exception):  # what it is will be found out, and counted, when it is joined
            event = self._looked_at(event)
        self._log.events.append(event)

    def _looked_at(self, event: Event) -> Event:
        kind, thread = event[0], event[2]
        if kind == BEGIN:
            if len(self._log.events) > _EVENTS_MAX or self._bytes > KEPT_BYTES_MAX:
                self.flush_passed()
            self._natives[thread] = threading.get_native_id()
            return event if self._forwards.of(thread) is not None else (*event, self._outside())
        if kind not in (ROUTER, WATCHED, EXPERTS):
            return event
        if in_backward():
            # Kept until the backward ends, it would keep the activations of a recomputed layer alive.
            with apart():
                event = (*event[:3], *map(_detached, event[3:]))
            self._end_with_backward()
        self._bytes += sum(map(_bytes, event[3:]))
        return event

    def _end_with_backward(self) -> None:
        """The calls of a recomputation are complete when the backward is, which this thread is in."""
        if not self._ends_with_backward:
            self._ends_with_backward = True
            after_backward(self.end_backward)  # else the next forward ends them

    def end_backward(self) -> None:
        """Join what was recomputed, and all that no forward under way will end."""
        self._ends_with_backward = False
        self.flush(None)
        self._recorder.end_forward()

    def flush(self, thread: int | None) -> None:
        """The forward of a thread ends: its calls, and those of threads that are in none, are complete."""
        if not self._log.events and self._joiner.idle:
            return
        with self._lock:
            self._bytes = 0
            busy = set(self._forwards.threads()) - {thread}
            self._joiner.add(self._log.take())
            self._finish(self._joiner.finished(lambda t: t not in busy))

    def flush_passed(self) -> None:
        """Join what is complete by all signs, so that little is kept."""
        with self._lock:
            self._bytes = 0
            self._joiner.add(self._log.take())
            self._finish(self._joiner.passed())

    def forget(self, thread: int) -> None:
        """The calling thread's calls under way were interrupted, and no hook was told."""
        with self._lock:
            context = self._forwards.of(thread)
            if context is not None:
                context.failed = True
            self.flush(thread)

    # -- joined ---------------------------------------------------------------------------------------

    def _context_of(self, thread: int) -> ForwardContext:
        return self._forwards.of(thread) or self._outside()

    def _orphan(self, site: int) -> None:
        self.orphans += 1

    def _finish(self, calls: Sequence[RouterCall]) -> None:
        """Read the calls, and hand them to the recorder."""
        if not calls:
            return
        with apart():
            for call in calls:
                self._finish_one(call, self._context(call))
            for router in {id(r): r for r in (self._routers[c.site] for c in calls)}.values():
                copies = router.copies
                if copies is not None:
                    copies.end_forward()
                    if copies.settled:
                        router.copies = None

    def _context(self, call: RouterCall) -> ForwardContext:
        context = call.context or self._outside()
        if call.recomputed and not context.of_model and self._forwards.last is not None:
            return self._forwards.last  # the forward that began last is the one that a backward recomputes
        return context

    def _finish_one(self, call: RouterCall, context: ForwardContext) -> None:
        if not context.recorded:
            return
        counts = self.counts[call.site]
        context.reached.add(call.site)
        reason = self._why_no_decision(call, context)
        if reason is not None:
            # A recomputation that is cut short decided nothing that the forward had not.
            if not (call.recomputed or context.recomputed):
                counts.seen += 1
                counts.lost[reason] += 1
            return
        counts.seen += 1
        try:
            reading = self._read(call)
            self._record(call, context, reading, counts)
        except Exception as error:  # a contract of the user's may raise anything
            counts.lost["unreadable"] += 1
            self._misread(call.site, error)

    def _why_no_decision(self, call: RouterCall, context: ForwardContext) -> str | None:
        """Why a router call assigned nothing, or nothing that was seen; None where it did."""
        router = self._routers[call.site]
        if not call.returned:
            return "interrupted"
        if call.experts or call.reading is not None or router.site.experts is None:
            return None
        if call.recomputed or context.failed:
            return "interrupted"
        state = self._joiner.states[call.site]
        if call.fused or not (state.block_seen or state.experts_called):
            return None  # a fused block, which called its router but not its experts
        if not router.observe_block:
            router.observe_block = router.irregular = True
        return "without_experts"

    def _read(self, call: RouterCall) -> Reading:
        router, site = self._routers[call.site], self._routers[call.site].site
        if call.reading is not None:
            if isinstance(call.reading, Exception):
                raise call.reading
            self.counts[call.site].fused += 1
            return call.reading
        experts = call.experts
        if len(experts) > 1:
            combine = site.contract.combine
            if combine is None:
                raise ContractMismatch(f"expected one call of the experts, found {len(experts)}")
            calls = [Call(call.router_args, call.router_output, e.args, e.kwargs) for e in experts]
            return router.read(combine(call, calls, site.info.top_k))
        if experts:
            call.experts_args, call.experts_kwargs = experts[0].args, experts[0].kwargs
        return router.read(call)

    def _record(
        self, call: RouterCall, context: ForwardContext, reading: Reading, counts: SiteCounts
    ) -> None:
        site, recomputed = self._routers[call.site].site, call.recomputed or context.recomputed
        if recomputed or not context.of_model:
            detach(reading)  # no end of a forward will do it
        padding_T = context.padding_T
        if padding_T is not None and padding_T.shape[0] != reading.index_TK.shape[0]:
            padding_T = None
            if not context.padding_unclear and not recomputed:
                context.padding_unclear = True
                self.padding_unclear += 1
        record = CallRecord(
            site,
            counts.recorded,
            context.step,
            "recompute" if recomputed else "forward",
            context.stage,
            call.start_ns,
            call.end_ns,
            context.thread if call.thread == context.ident else self._native_id(call.thread, context),
            context.profiled,
            padding_T,
            order=(context.epoch, 0),
            sending=call.experts[0].sending if call.experts else None,
        )
        self._recorder.add(record, reading)
        if self._clock is not None:
            self._keep_times(call, counts.recorded)
        counts.recorded += 1

    def _keep_times(self, call: RouterCall, number: int) -> None:
        clock, name = self._clock, self._routers[call.site].site.name
        if call.mark is not None:
            clock.keep(name, number, "router", call.mark)  # type: ignore[union-attr]
        for experts in call.experts:
            if experts.mark is not None:
                clock.keep(name, number, "experts", experts.mark)  # type: ignore[union-attr]

    def _native_id(self, thread: int, context: ForwardContext) -> int:
        """Of a thread that helps the forward's own."""
        if thread not in self._natives:
            alive = {t.ident: t.native_id for t in threading.enumerate()}
            return alive.get(thread) or context.thread
        return self._natives[thread]

    def _misread(self, index: int, error: Exception) -> None:
        counts, site = self.counts[index], self._routers[index].site
        if counts.misread is not None:
            return
        counts.misread = (
            str(error) if isinstance(error, ContractMismatch) else f"{type(error).__name__}: {error}"
        )
        release = transformers_release(site.router)
        of_release = "" if release is None else f" of transformers {release}"
        warn_user(
            f"{site.name} ({site.info.router_class}{of_release}) cannot be read as '{site.contract.name}': "
            f"{counts.misread}. Such calls are counted as lost; the model runs on"
        )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return tuple(map(_detached, value)) if type(value) is tuple else value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if type(value) is tuple else 0
