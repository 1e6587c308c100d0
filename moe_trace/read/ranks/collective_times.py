"""Times of the collectives of one trace, and the MoE layers that called them.

The rules of the join:

    layer    a collective called inside a block's range, on the block's own thread
    kernels  those launched inside `record_param_comms`, on its thread
    gloo     `c10d::` operators and `gloo:` ranges of one kind are queued first in, first out, so the n-th
             operator belongs to the n-th range. Kineto gives them no common id; the pairs are used only if
             there are as many ranges as operators and no range starts before its operator.
    role     of an all-to-all in a layer: integers are counts; one before the experts' first product is the
             dispatch, one after it the combine. Without element types (gloo without `record_shapes`) the
             last one before the product is the dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moe_trace.data.calls.table import IntArray
from moe_trace.data.schema import RoutingSample
from moe_trace.data.summary import SampleKey
from moe_trace.data.trace_json.comms import GLOO, PARAMETERS, CommEvent, CommFacts
from moe_trace.data.trace_json.coverage import Coverage
from moe_trace.data.trace_json.events import EventTable
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.time.blocks import Blocks, find_blocks
from moe_trace.read.time.phase_detection import COMBINE, EXPERTS, Steps, find_steps

Role = Literal["counts", "dispatch", "combine"]
ROLES: tuple[Role, ...] = ("counts", "dispatch", "combine")
Nanoseconds = tuple[int, int]
"""(start, end)"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Collective:
    """One call of a collective, with times in nanoseconds on the trace's clock."""

    facts: CommFacts
    host_ns: Nanoseconds
    """Time of the call on the thread that made it."""
    work_ns: Nanoseconds | None
    """First to last of its kernels, or the time on the backend's own thread; None if neither is known. It
    begins when this rank arrives, and ends when it has everything that it waits for."""
    on_device: bool
    call: SampleKey | None = None
    """Router call in whose block it was called."""
    role: Role | None = None

    @property
    def bytes_in(self) -> int | None:
        """Input bytes, including this rank's own part."""
        elements, item = self.facts.elements_in, self.facts.item_bytes
        return None if elements is None or item is None else elements * item

    @property
    def time_ns(self) -> int | None:
        """Duration of its work, or None if unknown, as the call itself only queues it."""
        return None if self.work_ns is None else self.work_ns[1] - self.work_ns[0]


def split_bytes(collective: Collective, direction: Literal["in", "out"], parts: int) -> list[int] | None:
    """Return the bytes for each of the group's `parts` ranks, or None if the trace lacks them."""
    facts = collective.facts
    rows = facts.split_in if direction == "in" else facts.split_out
    elements = facts.elements_in if direction == "in" else facts.elements_out
    item = facts.item_bytes
    if rows is None or elements is None or item is None or (rows and len(rows) != parts) or parts < 1:
        return None
    if not rows:
        return [elements // parts * item] * parts
    total = sum(rows)
    return [elements // total * row * item for row in rows] if total else [0] * parts


def work_coverage(collectives: Sequence[Collective]) -> Coverage:
    """Return for how many of the layers' collectives the work is known."""
    known = [c.work_ns is not None for c in collectives if c.call is not None]
    return Coverage(joined=sum(known), total=len(known))


def find_collectives(
    samples: Sequence[RoutingSample], events: EventTable, kernels: Kernels
) -> tuple[Collective, ...]:
    """Return all collectives of a trace sorted by the time of their call, at no cost if it has none."""
    if not events.comms:
        return ()
    called = [c for c in events.comms if c.name == PARAMETERS]
    on_device = bool(called)
    if called:
        work = {i: _kernels_ns(event, events, kernels) for i, event in enumerate(called)}
    else:
        called = [c for c in events.comms if not c.name.startswith(GLOO)]
        called.sort(key=lambda c: c.start_ns)
        work = _gloo_work(called, [c for c in events.comms if c.name.startswith(GLOO)])
    found = [
        Collective(
            facts=event.facts,
            host_ns=(event.start_ns, event.end_ns),
            work_ns=work.get(i),
            on_device=on_device and work[i] is not None,
        )
        for i, event in enumerate(called)
    ]
    threads = np.array([event.thread for event in called], np.int64)
    blocks = find_blocks(samples, events)
    return _assign_to_layers(found, threads, blocks, find_steps(events, blocks))


def _kernels_ns(event: CommEvent, events: EventTable, kernels: Kernels) -> Nanoseconds | None:
    rows = kernels.within_ns(event.thread, event.start_ns, event.end_ns)
    start, end = kernels.start_ns[rows], kernels.start_ns[rows] + kernels.duration_ns[rows]
    nccl = np.array([events.names[n].startswith("nccl") for n in kernels.name[rows].tolist()], dtype=bool)
    if nccl.any():  # exclude copies into and out of its buffers
        start, end = start[nccl], end[nccl]
    return (int(start.min()), int(end.max())) if len(start) else None


def _gloo_work(called: Sequence[CommEvent], ranges: Sequence[CommEvent]) -> dict[int, Nanoseconds | None]:
    """Map the index of each operator to the range of its work."""
    found: dict[int, Nanoseconds | None] = {}
    for kind in {event.facts.kind for event in ranges}:
        operators = [i for i, event in enumerate(called) if event.facts.kind == kind]
        work = sorted((r for r in ranges if r.facts.kind == kind), key=lambda r: r.start_ns)
        pairs = list(zip(operators, work, strict=False))
        if len(operators) == len(work) and all(w.start_ns >= called[i].start_ns for i, w in pairs):
            found |= {i: (w.start_ns, w.end_ns) for i, w in pairs}
    return found


# -- layers ----------------------------------------------------------------------------------------------


def _assign_to_layers(
    found: Sequence[Collective], threads: IntArray, blocks: Blocks, steps: Steps
) -> tuple[Collective, ...]:
    starts = np.array([c.host_ns[0] for c in found], np.int64)
    block = blocks.at(threads, starts)
    step = steps.at(threads, starts)
    phase = [int(steps.phase[i]) if i >= 0 else -1 for i in step.tolist()]
    members: dict[int, list[int]] = {}
    for i, b in enumerate(block.tolist()):
        if b >= 0:
            members.setdefault(b, []).append(i)
    changed, calls = list(found), blocks.samples.call_keys()
    for b, indices in members.items():
        indices.sort(key=lambda i: found[i].host_ns[0])
        exchanges = [i for i in indices if found[i].facts.kind == "all_to_all"]
        roles = _roles([found[i].facts for i in exchanges], [phase[i] for i in exchanges])
        role_of = dict(zip(exchanges, roles, strict=True))
        for i in indices:
            changed[i] = replace(found[i], call=calls[b], role=role_of.get(i))
    changed.sort(key=lambda c: c.host_ns)
    return tuple(changed)


def _roles(facts: Sequence[CommFacts], phases: Sequence[int]) -> list[Role | None]:
    """Return the purpose of one layer's all-to-alls, in the order of their calls."""
    is_second_half = [phase in (COMBINE, EXPERTS) for phase in phases]
    moving = [i for i, fact in enumerate(facts) if not fact.is_integer]
    if len(moving) > 1 and len({is_second_half[i] for i in moving}) == 1:  # no product was seen between them
        is_second_half = [i == moving[-1] for i in range(len(facts))]
    roles: list[Role | None] = []
    for i, fact in enumerate(facts):
        followed = any(not is_second_half[k] and not facts[k].is_integer for k in range(i + 1, len(facts)))
        if fact.is_integer or (fact.is_integer is None and not is_second_half[i] and followed):
            roles.append("counts")
        else:
            roles.append("combine" if is_second_half[i] else "dispatch")
    return roles
