"""Process forwards that repeat earlier ones: they wait for each other and are processed in columns.

A plan is made from the first such forward, whose calls are joined one by one. Comparing whole columns shows
whether a later forward fits the plan; one that does not is joined like the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts.contract import ColumnReader
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.call import ForwardRecords
from moe_trace.record.calls.inplace_outputs import is_copy
from moe_trace.record.calls.pending import Columns, versions_of
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.calls.router_call import SiteState
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.hooks.events import BEGIN, BLOCK, BLOCK_END, EXPERTS, KINDS, ROUTER, WIDTH, EventLog
from moe_trace.record.hooks.site import SiteHooks

_PLANS_MAX = 64
# Maximum number of pending forwards, and of bytes they keep alive. Processing them in a row costs half as
# much as one by one, when none of our code and data is in the processor's caches.
_WAITING_MAX = 32
_WAITING_BYTES_MAX = 8 * 2**20

_EXPECTED = {BEGIN: None, ROUTER: -1, EXPERTS: None, BLOCK: None, BLOCK_END: None}
"""Last item of each event in a plain forward: no clock, no backward pass, no other process."""

Pick = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(slots=True, eq=False)
class ForwardPlan:
    """Event positions of a forward that, on one thread, called each router once and then its experts."""

    indices: tuple[int, ...]
    sites: tuple[RouterSite, ...]
    begins: Pick
    routers: Pick
    experts: Pick
    block_ends: Pick | None
    last_output: int
    """Position of the last router's output among the items."""
    codes: list[int]
    lasts: list[Any]
    read: ColumnReader
    versions: Sequence[tuple[int, ...]] = ()
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    """Whether it ran in inference mode, whose tensors have no versions."""

    @property
    def length(self) -> int:
        """Number of items per forward."""
        return WIDTH * len(self.codes)

    def columns(self, items: list[Any], thread: int, forwards: int = 1) -> Columns | None:
        """Return the tensors of all calls in a thread's forwards; None if one differs from the plan."""
        threads, firsts, seconds = items[1::WIDTH], items[2::WIDTH], items[3::WIDTH]
        if threads.count(thread) != len(threads):
            return None
        if items[4::WIDTH] != self.lasts * forwards or any(self.experts(seconds)):
            return None
        if self.block_ends is not None and any(end is not None for end in self.block_ends(firsts)):
            return None
        try:
            columns = self.read(self.routers(seconds), self.experts(firsts))
            return [*map(_detached, columns)] if columns[-1][-1].requires_grad else columns
        except Exception:  # reading one by one will name the bad call
            return None


def _detached(column: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.detach() for tensor in column]


def _picker(at: Sequence[int], events: int) -> Pick:
    """Return a function that picks items at some positions from the column of one or several forwards."""
    step = at[1] - at[0] if len(at) > 1 else events
    if list(at) == list(range(at[0], events, step)) and events == step * len(at):
        places = slice(at[0], None, step)
        return lambda column: column[places]
    return lambda column: [column[base + place] for base in range(0, len(column), events) for place in at]


def plan_of(items: list[Any], all_routers: Sequence[SiteHooks]) -> ForwardPlan | None:
    """Return a plan for forwards with these events if they are plain and their routers alike, else None."""
    codes = items[0::WIDTH]
    positions: dict[int, dict[int, int]] = {}
    for position, code in enumerate(codes):
        site, kind = divmod(code, KINDS)
        if kind not in _EXPECTED or positions.setdefault(site, {}).setdefault(kind, position) != position:
            return None
    routers = [all_routers[index] for index in positions]
    readers = {router.site.contract.columns.get(router.read) for router in routers}
    reader = readers.pop() if len(readers) == 1 else None
    if reader is None or len({router.site.info.num_experts for router in routers}) > 1:
        return None
    for router, found in zip(routers, positions.values(), strict=True):
        if [kind for kind in found if kind not in (BLOCK, BLOCK_END)] != [BEGIN, ROUTER, EXPERTS]:
            return None
        if not router.site.contract.reads_late or (router.copies is not None and router.copies.learning):
            return None
    ends = [found[BLOCK_END] for found in positions.values() if BLOCK_END in found]
    plan = ForwardPlan(
        indices=tuple(positions),
        sites=tuple(router.site for router in routers),
        begins=_picker([found[BEGIN] for found in positions.values()], len(codes)),
        routers=_picker([found[ROUTER] for found in positions.values()], len(codes)),
        experts=_picker([found[EXPERTS] for found in positions.values()], len(codes)),
        block_ends=_picker(ends, len(codes)) if ends else None,
        last_output=WIDTH * max(found[ROUTER] for found in positions.values()) + 3,
        codes=codes,
        lasts=[_EXPECTED[code % KINDS] for code in codes],
        read=reader,
    )
    columns, outputs = plan.columns(items, items[1]), plan.routers(items[3::WIDTH])
    returned = chain.from_iterable(output if isinstance(output, tuple) else (output,) for output in outputs)
    if columns is None or any(map(is_copy, returned)):
        return None  # versions of a copy and its original differ
    try:
        plan.versions = versions_of(columns)
    except (AttributeError, TypeError, RuntimeError):  # not tensors
        return None
    return plan


class PlainForwards:
    """Processor of forwards that follow a plan. Callers must serialise access.

    Events stay in the log until enough forwards are pending.

    Args:
        padding: `padding(context, tokens)` returns which tokens of a call are padding, or None.
        join: joins the events of a forward one by one, if they turn out to differ from its plan.
    """

    def __init__(
        self,
        routers: Sequence[SiteHooks],
        states: Sequence[SiteState],
        recorder: Recorder,
        log: EventLog,
        *,
        padding: Callable[[ForwardContext, int], Tensor | None],
        join: Callable[[list[Any], ForwardContext], None],
    ) -> None:
        self._routers, self._states, self._recorder, self._log = routers, states, recorder, log
        self._padding, self._join = padding, join
        self._plans: dict[Any, ForwardPlan] = {}
        self._last: ForwardPlan | None = None
        """Plan of the last forward."""
        self.waiting: list[tuple[ForwardPlan, ForwardContext]] = []
        """Forwards that are not recorded yet."""
        self._bytes = 0.0

    def forget(self) -> None:
        """Discard all plans, because their assumptions no longer hold."""
        self._plans.clear()
        self._last = None

    def learn(self, items: list[Any]) -> None:
        """Make a plan from a forward whose calls were all recorded, if it was plain."""
        plan = plan_of(items, self._routers)
        if plan is not None:
            if len(self._plans) >= _PLANS_MAX:
                self._plans.clear()
            self._plans[_key(plan.codes)] = plan

    def keep(self, context: ForwardContext) -> bool:
        """Keep a finished forward pending if its event codes follow a plan; return whether they do."""
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
        output = log.items[start + plan.last_output]
        if (
            self._bytes > _WAITING_BYTES_MAX
            or len(waiting) >= _WAITING_MAX
            or not self._recorder.may_defer
            or torch.is_grad_enabled()  # pending tensors would keep the activations alive
            or getattr(output[0] if isinstance(output, tuple) else output, "requires_grad", False)
        ):
            self.work_off()
        return True

    def work_off(self) -> None:
        """Record the pending forwards."""
        if not self.waiting:
            return
        waiting, self.waiting, self._bytes = self.waiting, [], 0.0
        all_items, at = self._log.take(waiting=True), 0
        for (plan, *_), run in groupby(waiting, key=lambda w: (w[0], w[1].held_bytes, w[1].ident)):
            contexts, size = [context for _, context in run], plan.length
            items = all_items if len(contexts) == len(waiting) else all_items[at : at + size * len(contexts)]
            at += size * len(contexts)
            if not self._take(plan, items, contexts):
                self._take_singly(plan, items, contexts)
            for context in contexts:
                context.padding_T = None  # the context outlives the forward

    def _take_singly(self, plan: ForwardPlan, items: list[Any], contexts: Sequence[ForwardContext]) -> None:
        """Record forwards one by one, because at least one of them differs from the plan."""
        for number, context in enumerate(contexts):
            part = items[number * plan.length : (number + 1) * plan.length]
            if len(contexts) == 1 or not self._take(plan, part, [context]):
                self._join(part, context)

    def _take(self, plan: ForwardPlan, items: list[Any], contexts: Sequence[ForwardContext]) -> bool:
        """Record forwards of one plan and thread; return False, with nothing recorded, if they differ."""
        columns = plan.columns(items, contexts[0].ident, len(contexts))
        if columns is None:
            return False
        try:
            first_calls = [column[:: len(plan.indices)] for column in (columns[0], columns[-1])]
            tokens = {tensor.shape[0] for tensor in chain(*first_calls)}
            if len(tokens) > 1:
                return False
            masks = [context.padding_T for context in contexts]
            if any(mask is not None for mask in masks):
                masks = [self._padding(context, *tokens) for context in contexts]
            if not self._recorder.add_forwards(
                self._records(plan, items, contexts), columns, plan.versions, masks
            ):
                return False
        except Exception:  # reading one by one will name the bad call
            return False
        for index in plan.indices:
            self._states[index].seen += len(contexts)
            self._states[index].recorded += len(contexts)
        return True

    def _records(
        self, plan: ForwardPlan, items: list[Any], contexts: Sequence[ForwardContext]
    ) -> list[ForwardRecords]:
        """Return the records of the calls."""
        times, calls = items[2::WIDTH], len(plan.sites)
        begins, ends = plan.begins(times), plan.routers(times)
        first = tuple([self._states[index].recorded for index in plan.indices])
        parts = [slice(start, start + calls) for start in range(0, len(begins), calls)]
        return [
            ForwardRecords(context, plan.sites, first, number, begins[part], ends[part])
            for number, (context, part) in enumerate(zip(contexts, parts, strict=True))
        ]


def _key(codes: Sequence[int]) -> Any:
    return tuple(codes), torch.is_inference_mode_enabled()  # inference tensors have no versions
