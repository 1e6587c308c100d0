"""Turn events into records: join, read and account for every router call."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moe_trace.find.contracts import AdapterMismatch, Call, RouterOutput
from moe_trace.find.routers import transformers_release
from moe_trace.record.calls.call import CallRecord, detach
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.calls.router_call import RouterCall, SiteState, why_no_decision
from moe_trace.record.forward.context import ForwardContext, ForwardStack
from moe_trace.record.forward.isolation import apart, warn_user
from moe_trace.record.hooks.checks import EventChecks
from moe_trace.record.hooks.events import CallClock, EventLog
from moe_trace.record.hooks.joining import CallJoiner
from moe_trace.record.hooks.repeated_forwards import PlainForwards
from moe_trace.record.hooks.site import SiteHooks

_COMPARED_CALLS = 4
"""Number of calls whose counts are compared with those that the router returns."""


class CallCollector:
    """Collector of all threads' events, which passes finished calls to the recorder.

    Args:
        outside: returns the context of a router call outside any forward of the model.
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
        self._states = [router.captured.state for router in routers]
        self.orphans = 0
        """Number of experts calls that belong to no router call."""
        self.padding_unclear = 0
        """Number of forwards in which a block received another number of tokens than the mask has."""
        self._routers = routers
        self._log = log
        self._forwards = forwards
        self._outside = outside
        self._recorder = recorder
        self._clock = clock
        self._joiner = CallJoiner(
            [router.site for router in routers],
            states=self._states,
            context_of=self._context_of,
            orphan=self._orphan,
        )
        self._lock = threading.RLock()
        self._plain = PlainForwards(
            routers, self._states, recorder, log, padding=self._padding, join=self._join_deferred
        )
        recorder.on_rewritten = self._copy_from_now_on
        self.checks = EventChecks(
            log,
            forwards,
            routers,
            outside=outside,
            join_passed=self.flush_passed,
            end_backward=self.end_backward,
        )

    # -- while the model runs -------------------------------------------------------------------------

    def end_backward(self) -> None:
        """Join recomputed calls, and all calls that no running forward will end."""
        self.flush(None)
        self._recorder.end_forward()

    def flush(self, thread: int | None, *, innermost: bool = False) -> bool:
        """End the forward of a thread: its calls, and those outside any forward, are complete.

        Args:
            innermost: whether only the innermost forward of the thread ends.

        Returns:
            Whether calls were passed to the recorder. Those of a plain forward wait for others.
        """
        # Few function calls until the forward is kept: code that runs once per forward is in no cache.
        if len(self._log.items) == self._log.waiting and not self._joiner.begun:
            return False
        with self._lock:
            if self.checks.has_looked:
                self.checks.start_again()
            context, stacks = None, self._forwards.stacks
            if len(stacks) == 1 and thread in stacks and not self._joiner.begun and self._clock is None:
                context = stacks[thread][-1].context  # nothing else is running
                if not context.recorded or context.recomputed or context.failed or context.ident != thread:
                    context = None
                elif self._plain.keep(context):
                    return not self._plain.waiting
            self._plain.work_off()
            items = self._log.take()
            self._joiner.add(items)
            calls = self._joiner.finished(self._forwards.contexts(without=thread, innermost=innermost))
            recorded = self._finish(calls)
            if context is not None and recorded == len(calls) == len({call.site for call in calls}) > 0:
                self._plain.learn(items)
        return True

    def _join_deferred(self, items: list[Any], context: ForwardContext) -> None:
        """Join a plain forward that waited and differs from its plan; nothing else is running."""
        self._joiner.add(items, context)
        self._finish(self._joiner.finished(()))

    @property
    def counts(self) -> list[SiteState]:
        """Counts of the calls, by router."""
        self.finish_waiting()
        return self._states

    def finish_waiting(self) -> None:
        """Record the pending forwards."""
        with self._lock:
            self._plain.work_off()

    def forget_plans(self) -> None:
        """Discard the plans, because outputs of the next forward may differ."""
        with self._lock:
            self._plain.work_off()
            self._plain.forget()
            for router in self._routers:
                if router.copies is None:
                    router.copy_from_now_on(static=False)

    def _copy_from_now_on(self, names: set[str]) -> None:
        """Copy outputs of routers that reuse the memory of earlier ones: see `calls/inplace_outputs.py`."""
        self._plain.forget()
        for router in self._routers:
            if router.site.name in names:
                router.copy_from_now_on()

    def flush_passed(self) -> None:
        """Join calls that appear complete: to free memory, and before a forward begins inside another."""
        with self._lock:
            self.checks.start_again()
            self._plain.work_off()
            self._joiner.add(self._log.take())
            self._finish(self._joiner.passed())

    def forget(self, thread: int) -> None:
        """Discard the thread's unfinished calls, interrupted without any hook being called."""
        with self._lock:
            for entered in self._forwards.stacks.get(thread, ()):
                entered.context.failed = True
            self.flush(thread)

    # -- joined ---------------------------------------------------------------------------------------

    def _context_of(self, thread: int) -> ForwardContext:
        return self._forwards.of(thread) or self._outside()

    def _orphan(self, site: int) -> None:
        self.orphans += 1
        name, refuted = self._routers[site].site.name, self._states[site].refute()
        self._recorder.refusals.taken_back.add(name, refuted)

    def _finish(self, calls: Sequence[RouterCall]) -> int:
        """Read the calls and pass them to the recorder; return how many were recorded."""
        if not calls:
            return 0
        before = sum(state.recorded for state in self._states)
        for last in {call.context: call for call in calls if call.context and call.context.failed}.values():
            # It is unknown which of its experts were still to come.
            last.cut_off = bool(self._routers[last.site].site.listed)
        with apart():
            for call in calls:
                self._finish_one(call, self._context(call))
            for site in {call.site for call in calls}:
                self._routers[site].end_copies()
        return sum(state.recorded for state in self._states) - before

    def _context(self, call: RouterCall) -> ForwardContext:
        context = call.context or self._outside()
        if call.recomputed and not context.of_model and self._forwards.last is not None:
            return self._forwards.last  # the one that a backward pass recomputes
        return context

    def _finish_one(self, call: RouterCall, context: ForwardContext) -> None:
        if not context.recorded:
            return
        context.reached.append((call.site,))
        router, state = self._routers[call.site], self._states[call.site]
        reason = why_no_decision(call, router.site, state, context, observed=router.observe_block)
        if state.elsewhere or call.fused or reason in ("without_experts", "unjoined"):
            router.keep_block()
        if reason is not None:
            # An interrupted recomputation decided nothing beyond what the forward did.
            if not (call.recomputed or context.recomputed):
                state.seen += 1
                state.lost[reason] += 1
            return
        state.seen += 1
        try:
            self._record(call, context, self._read(call))
        except Exception as error:  # a user's contract may raise anything
            state.lost["unreadable"] += 1
            self._misread(call.site, error)

    def _read(self, call: RouterCall) -> RouterOutput:
        router, site = self._routers[call.site], self._routers[call.site].site
        if call.reading is not None:
            if isinstance(call.reading, Exception):
                raise call.reading
            self._states[call.site].fused += 1
            return call.reading
        experts = call.experts
        if len(experts) > 1:
            combine = site.contract.combine
            if combine is None:
                raise AdapterMismatch(f"expected one call of the experts, found {len(experts)}")
            calls = [Call(call.router_args, call.router_output, e.args, e.kwargs) for e in experts]
            return router.read(combine(call, calls, site.info.top_k))
        if experts:
            call.experts_args, call.experts_kwargs = experts[0].args, experts[0].kwargs
        if call.rows:
            rows = Counter[int]()  # an expert may be called several times, or never
            for number, count in call.rows:
                rows[number] += count
            call.expert_rows = tuple(rows[number] for number in range(len(site.listed)))
        return router.read(call)

    def _record(self, call: RouterCall, context: ForwardContext, reading: RouterOutput) -> None:
        router, state = self._routers[call.site], self._states[call.site]
        site, recomputed = router.site, call.recomputed or context.recomputed
        detach(reading)
        mask = self._padding(context, reading.index_TK.shape[0], recomputed)
        record = CallRecord(
            site,
            state.recorded,
            context.step,
            "recompute" if recomputed else "forward",
            context.stage,
            call.start_ns,
            call.end_ns,
            context.thread if call.thread == context.ident else self.checks.native_id(call.thread, context),
            context.profiled,
            order=(context.epoch, 0),
            sending=call.experts[0].sending if call.experts else None,
            rows=reading.rows,
            told_E=reading.told_E if state.recorded < _COMPARED_CALLS else None,
            slots_2P=reading.slots_2P,
            tokens=context.tokens,
            batch=context.batch,
        )
        by_reference = router.copies is None and len(call.experts) == 1  # else it was copied
        self._recorder.add(record, reading, mask, router.usual if by_reference else None)
        if self._clock is not None:
            self._keep_times(call, state.recorded)
        self._recorder.refusals.taken_back.add(site.name, state.note(call))

    def _padding(self, context: ForwardContext, tokens: int, recomputed: bool = False) -> Tensor | None:
        """Return the [tokens] bool mask of padding; None if unknown."""
        if context.padding_T is None or context.padding_T.shape[0] == tokens:
            return context.padding_T
        if not context.padding_unclear and not recomputed:
            context.padding_unclear = True
            self.padding_unclear += 1
        return None

    def _keep_times(self, call: RouterCall, number: int) -> None:
        clock, name = self._clock, self._routers[call.site].site.name
        if call.mark is not None:
            clock.keep(name, number, "router", call.mark)  # type: ignore[union-attr]
        for experts in (experts_call for experts_call in call.experts if experts_call.mark is not None):
            clock.keep(name, number, "experts", experts.mark)  # type: ignore[union-attr]

    def _misread(self, index: int, error: Exception) -> None:
        state, site = self._states[index], self._routers[index].site
        if state.misread is not None:
            return
        state.misread = (
            str(error) if isinstance(error, AdapterMismatch) else f"{type(error).__name__}: {error}"
        )
        release = transformers_release(site.router)
        of_release = "" if release is None else f" of transformers {release}"
        warn_user(
            f"{site.name} ({site.info.router_class}{of_release}) cannot be read as '{site.contract.name}': "
            f"{state.misread}. Such calls are counted as lost; the model runs on"
        )
