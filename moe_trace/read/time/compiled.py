"""Phases of calls inside compiled code, with and without CUDA graphs, by the compiler's own notes.

The phases of a layer's launches follow from the same structure as those of eager operators: the experts'
matrix products are the landmarks. A kernel that was fused from several phases, layers or the rest of the
model counts in equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.read.file.coverage import Coverage, TimeCoverage
from moe_trace.read.file.events import EventTable
from moe_trace.read.file.launches import Kernels
from moe_trace.read.time.compiled_calls import CompiledCalls, Work
from moe_trace.read.time.phase_detection import (
    COMBINE,
    DISPATCH,
    EXPERTS,
    OTHER,
    ROUTER,
    SHARED,
    phases_in_experts,
)
from moe_trace.read.time.phases import CallTimes, Times, device_times, span_and_union

IntArray = npt.NDArray[np.int64]


def measure_compiled(
    calls: CallTable, graphs: Sequence[CompiledGraph], events: EventTable, kernels: Kernels
) -> CallTimes | None:
    """Times of the calls inside compiled code whose kernels are known; None where there are no such calls."""
    inside = np.flatnonzero(calls.in_graph & ~np.isnan(calls.places.span("host", "graph")[:, 0]))
    if not len(inside) or not graphs or not len(kernels.start_ns):
        return None
    join = CompiledCalls(calls, graphs, events, kernels)
    forward = join.forward(inside)
    backward = join.backward()
    timed = sorted({one.call for one in forward})
    span, union, whole = _span_union_whole(forward, timed, kernels)
    times = _times(forward, timed, kernels)
    nothing = np.zeros(len(timed), np.int64)
    shared = sum(one.share > 1 for one in forward)
    shared_ns = sum(int(kernels.duration_ns[one.kernel]) // one.share for one in forward if one.share > 1)
    return CallTimes(
        samples=calls.take(np.array(timed, np.int64)),
        forward=times,
        backward=_times(backward, timed, kernels, backward=True).unless_empty(),
        block_host_ns=nothing,
        host_gap_ns=nothing.copy(),
        device_span_ns=span,
        device_gap_ns=span - union + whole - times.busy_ns.sum(1),
        device_overlap_ns=whole - union,
        on_device=True,
        coverage=TimeCoverage(
            compiled=Coverage(joined=len(timed), total=len(inside)),
            unshared=Coverage(
                joined=len(forward) - shared,
                total=len(forward),
                joined_ns=int(times.busy_ns.sum()) - shared_ns,
                total_ns=int(times.busy_ns.sum()),
            ),
        ),
    )


def _times(work: Sequence[Work], timed: Sequence[int], kernels: Kernels, *, backward: bool = False) -> Times:
    """[timed, P] the kernels of each call by phase; a kernel of several parts counts in equal ones."""
    index = {row: i for i, row in enumerate(timed)}
    work = sorted((one for one in work if one.call in index), key=lambda one: (index[one.call], one.step))
    row = np.array([index[one.call] for one in work], np.int64)
    kernel = np.array([one.kernel for one in work], np.int64)
    share = np.array([one.share for one in work], np.int64)
    phase = _phases(work, row, backward=backward)
    return device_times(len(timed), row, phase, kernels.start_ns[kernel], kernels.duration_ns[kernel], share)


def _span_union_whole(
    work: Sequence[Work], timed: Sequence[int], kernels: Kernels
) -> tuple[IntArray, IntArray, IntArray]:
    """[timed] first kernel to last, time in which any ran, and the sum of their whole times."""
    index = {row: i for i, row in enumerate(timed)}
    row = np.array([index[one.call] for one in work], np.int64)
    kernel = np.array([one.kernel for one in work], np.int64)
    start, duration = kernels.start_ns[kernel], kernels.duration_ns[kernel]
    span, union = span_and_union(len(timed), row, start, duration)
    whole = np.zeros(len(timed), np.int64)
    np.add.at(whole, row, duration)
    return span, union, whole


def _phases(work: Sequence[Work], row: IntArray, *, backward: bool) -> IntArray:
    """Of each kernel. A backward goes the other way: what comes before the products is the combine's."""
    place = np.array([one.place for one in work], object)
    product, gather, write = (
        np.array([getattr(one.launch, name) for one in work], bool) for name in ("product", "gather", "write")
    )
    phase = np.full(len(work), OTHER, np.int64)
    phase[place == "router"] = ROUTER
    experts = np.flatnonzero(place == "experts")
    if not backward:
        phase[experts] = phases_in_experts(row[experts], product[experts], gather[experts], write[experts])
    for kind in ("experts", "block") if backward else ("block",):
        mine = np.flatnonzero(place == kind)
        for call in set(row[mine].tolist()):
            rows = mine[row[mine] == call]
            products = np.flatnonzero(product[rows])
            if kind == "experts":
                phase[rows] = EXPERTS
            if len(products):
                before, after = (COMBINE, DISPATCH) if kind == "experts" else (OTHER, OTHER)
                phase[rows[: products[0]]], phase[rows[products[-1] + 1 :]] = before, after
                phase[rows[products[0] : products[-1] + 1]] = EXPERTS if kind == "experts" else SHARED
    return phase
