"""Forwards that run as earlier ones did: their events are taken apart in columns, and never looked at singly.

A plan says where the calls stand among the events of a forward that called each of some routers once, and
then its experts, on one thread. It is made from the first such forward, which was joined one by one. Whether
a later forward fits is told by comparing whole columns; one that does not is joined as the first was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts.contract import ColumnReader
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.call import ForwardRecords
from moe_trace.record.calls.inplace_outputs import is_copy
from moe_trace.record.calls.pending import Columns, versions_of
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.hooks.events import BEGIN, BLOCK, BLOCK_END, EXPERTS, KINDS, ROUTER, WIDTH
from moe_trace.record.hooks.site import SiteHooks

_EXPECTED = {BEGIN: None, ROUTER: -1, EXPERTS: None, BLOCK: None, BLOCK_END: None}
"""The last item of each event of a plain forward: no clock, no backward, no other process."""

Pick = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(slots=True, eq=False)
class ForwardPlan:
    """See above. `first` and `taken` number the calls: of each router `first + taken` is the next one's."""

    indices: tuple[int, ...]
    sites: tuple[RouterSite, ...]
    begins: Pick
    routers: Pick
    experts: Pick
    block_ends: Pick | None
    last_output: int
    """Where the last router's output stands among the items."""
    codes: list[int]
    lasts: list[Any]
    read: ColumnReader
    versions: Sequence[tuple[int, ...]] = ()
    first: tuple[int, ...] = ()
    taken: int = 0
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    """Whose tensors have no versions."""

    @property
    def length(self) -> int:
        """Items of a forward."""
        return WIDTH * len(self.codes)

    @staticmethod
    def has_graph(output: Any) -> bool:
        """Whether a router was called with gradients, as far as its first output tells."""
        return getattr(output[0] if isinstance(output, tuple) else output, "requires_grad", False)

    def columns(self, items: list[Any], thread: int, forwards: int = 1) -> Columns | None:
        """The tensors of all calls of a thread's forwards; None where one of them is unlike the plan."""
        threads, firsts, seconds = items[1::WIDTH], items[2::WIDTH], items[3::WIDTH]
        if threads.count(thread) != len(threads):
            return None
        if items[4::WIDTH] != self.lasts * forwards or any(self.experts(seconds)):
            return None
        if self.block_ends is not None and any(one is not None for one in self.block_ends(firsts)):
            return None
        try:
            columns = self.read(self.routers(seconds), self.experts(firsts))
            return [*map(_detached, columns)] if columns[-1][-1].requires_grad else columns
        except Exception:  # read one by one, the call that is wrong will be named
            return None

    def records(self, items: list[Any], contexts: Sequence[ForwardContext]) -> list[ForwardRecords]:
        """What is known of the calls of forwards beside their tensors."""
        times, calls = items[2::WIDTH], len(self.sites)
        begins, ends = self.begins(times), self.routers(times)
        return [
            ForwardRecords(
                context,
                self.sites,
                self.first,
                self.taken + number,
                begins[number * calls : (number + 1) * calls],
                ends[number * calls : (number + 1) * calls],
            )
            for number, context in enumerate(contexts)
        ]


def _has_copies(output: Any) -> bool:
    return any(is_copy(value) for value in (output if isinstance(output, tuple) else (output,)))


def _detached(column: Sequence[Tensor]) -> Sequence[Tensor]:
    """What keeps no graph alive."""
    return [tensor.detach() for tensor in column]


def _picker(at: Sequence[int], events: int) -> Pick:
    """Takes the items at some places of the column of a forward, or of those of several that follow."""
    step = at[1] - at[0] if len(at) > 1 else events
    if list(at) == list(range(at[0], events, step)) and events == step * len(at):
        places = slice(at[0], None, step)
        return lambda column: column[places]
    return lambda column: [column[base + place] for base in range(0, len(column), events) for place in at]


def plan_of(items: list[Any], all_routers: Sequence[SiteHooks]) -> ForwardPlan | None:
    """A plan for forwards with these events, if they are plain and their routers alike."""
    codes = items[0::WIDTH]
    places: dict[int, dict[int, int]] = {}
    for at, code in enumerate(codes):
        site, kind = divmod(code, KINDS)
        if kind not in _EXPECTED or places.setdefault(site, {}).setdefault(kind, at) != at:
            return None
    routers = [all_routers[index] for index in places]
    readers = {router.site.contract.columns.get(router.read) for router in routers}
    reader = readers.pop() if len(readers) == 1 else None
    if reader is None or len({router.site.info.num_experts for router in routers}) > 1:
        return None
    for router, found in zip(routers, places.values(), strict=True):
        if [kind for kind in found if kind not in (BLOCK, BLOCK_END)] != [BEGIN, ROUTER, EXPERTS]:
            return None
        if not router.site.contract.reads_late or (router.copies is not None and router.copies.learning):
            return None
    ends = [at[BLOCK_END] for at in places.values() if BLOCK_END in at]
    plan = ForwardPlan(
        indices=tuple(places),
        sites=tuple(router.site for router in routers),
        begins=_picker([at[BEGIN] for at in places.values()], len(codes)),
        routers=_picker([at[ROUTER] for at in places.values()], len(codes)),
        experts=_picker([at[EXPERTS] for at in places.values()], len(codes)),
        block_ends=_picker(ends, len(codes)) if ends else None,
        last_output=WIDTH * max(at[ROUTER] for at in places.values()) + 3,
        codes=codes,
        lasts=[_EXPECTED[code % KINDS] for code in codes],
        read=reader,
    )
    columns = plan.columns(items, items[1])
    if columns is None or any(map(_has_copies, plan.routers(items[3::WIDTH]))):
        return None  # of a copy the version is another than of what it was made of
    try:
        plan.versions = versions_of(columns)
    except (AttributeError, TypeError, RuntimeError):  # not tensors
        return None
    return plan
