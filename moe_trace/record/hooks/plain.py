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
from moe_trace.record.hooks.events import WIDTH
from moe_trace.record.hooks.site import SiteHooks

_PLANS_MAX = 64
# Forwards that wait, and what they may keep alive. Done in a row they cost half of what they do one by one,
# when nothing of ours is in the processor's caches.
_WAITING_MAX = 32
_WAITING_BYTES_MAX = 2**20


class PlainForwards:
    """Takes the events of forwards that follow a plan. Its user serialises.

    Args:
        padding: `padding(context, tokens)`: which tokens of a call are padding, where that is known.
        join: has the events of a forward joined one by one, where they turn out to be unlike its plan.
    """

    def __init__(
        self,
        routers: Sequence[SiteHooks],
        counts: Sequence[SiteCounts],
        recorder: Recorder,
        *,
        padding: Callable[[ForwardContext, int], Tensor | None],
        join: Callable[[list[Any], ForwardContext], None],
    ) -> None:
        self._routers, self._counts, self._recorder = routers, counts, recorder
        self._padding, self._join = padding, join
        self._plans: dict[Any, ForwardPlan] = {}
        self._last: ForwardPlan | None = None
        """What the last forward followed."""
        self._counting: ForwardPlan | None = None
        """A plan that has counted forwards which are not counted router by router yet."""
        self._waiting: list[tuple[ForwardPlan, list[Any], ForwardContext]] = []
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

    def keep(self, items: list[Any], context: ForwardContext) -> bool:
        """Keep the events of a forward that ends, if they follow a plan as far as they tell by themselves."""
        codes, plan = items[0::WIDTH], self._last
        if plan is None or plan.codes != codes or plan.inference != torch.is_inference_mode_enabled():
            plan = self._last = self._plans.get(_key(codes))
            if plan is None:
                return False
        threads = items[1::WIDTH]
        if threads.count(context.ident) != len(threads):
            return False
        self._waiting.append((plan, items, context))
        context.reached.append(plan.indices)
        self._bytes += context.held_bytes
        if (
            self._bytes > _WAITING_BYTES_MAX
            or len(self._waiting) >= _WAITING_MAX
            or not self._recorder.may_defer
            or torch.is_grad_enabled()  # what is kept would keep the activations
            or plan.has_graph(items)
        ):
            self.work_off()
        return True

    def work_off(self) -> None:
        """Record the forwards that wait."""
        if not self._waiting:
            return
        waiting, self._waiting, self._bytes = self._waiting, [], 0.0
        for (plan, _), run in groupby(waiting, key=lambda one: (one[0], one[2].held_bytes)):
            forwards = [(items, context) for _, items, context in run]
            if len(forwards) == 1 or not self._take(plan, forwards):
                for forward in forwards:
                    if not self._take(plan, [forward]):
                        self.settle()
                        self._join(*forward)
            for _, context in forwards:
                context.padding_T = None  # the context is kept for longer

    def _take(self, plan: ForwardPlan, forwards: Sequence[tuple[list[Any], ForwardContext]]) -> bool:
        """Record forwards of one plan; nothing is where one of them is unlike the others."""
        items = forwards[0][0] if len(forwards) == 1 else [*chain.from_iterable([one for one, _ in forwards])]
        columns = plan.columns(items, len(forwards))
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
            masks = [context.padding_T for _, context in forwards]
            if any(mask is not None for mask in masks):
                masks = [self._padding(context, *tokens) for _, context in forwards]
            if not self._recorder.add_forwards(plan.records(items, forwards), columns, plan.versions, masks):
                return False
        except Exception:  # read one by one, the call that is wrong will be named
            return False
        plan.taken += len(forwards)
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
