"""Forwards that ran as earlier ones did wait for each other, and are then taken apart in columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from moe_trace.record.calls.counts import SiteCounts
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.hooks.columns import ForwardPlan, plan_of
from moe_trace.record.hooks.events import WIDTH, EventLog
from moe_trace.record.hooks.site import SiteHooks

_PLANS_MAX = 64
# Forwards that wait, and what they may keep alive. Done in a row they cost half of what they do one by one,
# when nothing of ours is in the processor's caches.
_WAITING_MAX = 32
_WAITING_BYTES_MAX = 8 * 2**20


class PlainForwards:
    """Takes the events of forwards that follow a plan. Its user serialises.

    They stay where the hooks put them until enough forwards wait.

    Args:
        padding: `padding(context, tokens)`: which tokens of a call are padding, where that is known.
        join: has the events of a forward joined one by one, where they turn out to be unlike its plan.
    """

    def __init__(
        self,
        routers: Sequence[SiteHooks],
        counts: Sequence[SiteCounts],
        recorder: Recorder,
        log: EventLog,
        *,
        padding: Callable[[ForwardContext, int], Tensor | None],
        join: Callable[[list[Any], ForwardContext], None],
    ) -> None:
        self._routers, self._counts, self._recorder, self._log = routers, counts, recorder, log
        self._padding, self._join = padding, join
        self._plans: dict[Any, ForwardPlan] = {}
        self._last: ForwardPlan | None = None
        """What the last forward followed."""
        self._counting: ForwardPlan | None = None
        """A plan that has counted forwards which are not counted router by router yet."""
        self.waiting: list[tuple[ForwardPlan, ForwardContext]] = []
        """Forwards that are not recorded yet."""
        self._bytes = 0.0

    def forget(self) -> None:
        """What the plans took for granted does not hold any more."""
        self._plans.clear()
        self._last = None

    def learn(self, items: list[Any]) -> None:
        """Make a plan of a forward whose calls were all recorded, if it was a plain one."""
        plan = plan_of(items, self._routers)
        if plan is not None:
            if len(self._plans) >= _PLANS_MAX:
                self._plans.clear()
            self._plans[_key(plan.codes)] = plan

    def keep(self, context: ForwardContext) -> bool:
        """Let a forward that ends wait, if its events follow a plan as far as they tell by themselves."""
        log, plan = self._log, self._last
        start = log.waiting
        codes = log.items[start::WIDTH]
        if plan is None or plan.codes != codes or plan.inference != torch.is_inference_mode_enabled():
            plan = self._last = self._plans.get(_key(codes))
            if plan is None:
                return False
        log.waiting = start + plan.length
        waiting = self.waiting
        waiting.append((plan, context))
        context.reached.append(plan.indices)
        self._bytes += context.held_bytes
        if (
            self._bytes > _WAITING_BYTES_MAX
            or len(waiting) >= _WAITING_MAX
            or not self._recorder.may_defer
            or torch.is_grad_enabled()  # what is kept would keep the activations
            or plan.has_graph(log.items[start + plan.last_output])
        ):
            self.work_off()
        return True

    def work_off(self) -> None:
        """Record the forwards that wait."""
        if not self.waiting:
            return
        waiting, self.waiting, self._bytes = self.waiting, [], 0.0
        all_items, at = self._log.take_waiting(), 0
        for (plan, *_), run in groupby(waiting, key=lambda one: (one[0], one[1].held_bytes, one[1].ident)):
            contexts, size = [context for _, context in run], plan.length
            items = all_items if len(contexts) == len(waiting) else all_items[at : at + size * len(contexts)]
            at += size * len(contexts)
            if not self._take(plan, items, contexts):
                self._take_singly(plan, items, contexts)
            for context in contexts:
                context.padding_T = None  # the context is kept for longer

    def _take_singly(self, plan: ForwardPlan, items: list[Any], contexts: Sequence[ForwardContext]) -> None:
        """One of them is unlike its plan."""
        for number, context in enumerate(contexts):
            own = items[number * plan.length : (number + 1) * plan.length]
            if len(contexts) == 1 or not self._take(plan, own, [context]):
                self.settle()
                self._join(own, context)

    def _take(self, plan: ForwardPlan, items: list[Any], contexts: Sequence[ForwardContext]) -> bool:
        """Record forwards of one plan and thread; nothing is where one of them is unlike the others."""
        columns = plan.columns(items, contexts[0].ident, len(contexts))
        if columns is None:
            return False
        if plan is not self._counting:
            self.settle()
            self._counting = plan
            plan.first = tuple([self._counts[index].recorded for index in plan.indices])
        try:
            first_calls = [column[:: len(plan.indices)] for column in (columns[0], columns[-1])]
            tokens = {tensor.shape[0] for tensor in chain(*first_calls)}
            if len(tokens) > 1:
                return False
            masks = [context.padding_T for context in contexts]
            if any(mask is not None for mask in masks):
                masks = [self._padding(context, *tokens) for context in contexts]
            if not self._recorder.add_forwards(plan.records(items, contexts), columns, plan.versions, masks):
                return False
        except Exception:  # read one by one, the call that is wrong will be named
            return False
        plan.taken += len(contexts)
        return True

    def settle(self) -> None:
        """Count router by router what was taken in columns."""
        plan, self._counting = self._counting, None
        if plan is not None:
            for index in plan.indices:
                self._counts[index].seen += plan.taken
                self._counts[index].recorded += plan.taken
            plan.taken = 0


def _key(codes: Sequence[int]) -> Any:
    return tuple(codes), torch.is_inference_mode_enabled()  # whose tensors have no versions
