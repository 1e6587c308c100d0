"""Phases of calls inside compiled code, with and without CUDA graphs, by the compiler's provenance.

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
from moe_trace.data.trace_json.coverage import Coverage, TimeCoverage
from moe_trace.data.trace_json.events import EventTable
from moe_trace.data.trace_json.kernels import Kernels
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
from moe_trace.timeline.correlate.compiled_calls import CompiledCalls, Work, join_compiled

IntArray = npt.NDArray[np.int64]


def forward_phases(join: CompiledCalls) -> tuple[list[Work], IntArray]:
    """What ran for the forward calls, by call and place in it, with the phase of each."""
    work = sorted(join.forward(), key=lambda one: (one.call, one.step))
    return work, _phases(work, np.array([one.call for one in work], np.int64), backward=False)


def measure_compiled(
    calls: CallTable, graphs: Sequence[CompiledGraph], events: EventTable, kernels: Kernels
) -> CallTimes | None:
    """Times of the calls inside compiled code whose kernels are known; None where there are no such calls."""
    join = join_compiled(calls, graphs, events, kernels)
    if join is None:
        return None
    on_device, kernels = join.on_device, join.kernels
    forward, backward = join.forward(), join.backward()
    timed = sorted({one.call for one in forward})
    span, union, whole = _span_union_whole(forward, timed, kernels)
    busy = _times(forward, timed, kernels)
    gap = span - union + whole - busy.busy_ns.sum(1)
    busy_back = _times(backward, timed, kernels, backward=True)
    nothing = np.zeros(len(timed), np.int64)
    return CallTimes(
        samples=calls.take(np.array(timed, np.int64)),
        forward=busy if on_device else _on_host(busy),
        backward=(busy_back if on_device else _on_host(busy_back)).unless_empty(),
        block_host_ns=nothing if on_device else span,
        host_gap_ns=nothing if on_device else gap,
        device_span_ns=span if on_device else nothing,
        device_gap_ns=gap if on_device else nothing,
        device_overlap_ns=whole - union if on_device else nothing,
        on_device=on_device,
        coverage=TimeCoverage(
            compiled=Coverage(joined=len(timed), total=len(join.inside)),
            unshared=_unshared([*forward, *backward], kernels),
            cpp_kernels=Coverage() if on_device else join.cpp_kernels(),
        ),
    )


def _on_host(times: Times) -> Times:
    """A CPU's kernels are operators of the host, which do not overlap on their thread."""
    nothing = np.zeros_like(times.host_ns)
    return Times(host_ns=times.busy_ns, busy_ns=nothing, span_ns=nothing.copy(), kernels=nothing.copy())


def _unshared(work: Sequence[Work], kernels: Kernels) -> Coverage:
    """How much of the work is of kernels that are of one part of the model."""
    parts_ns = [int(kernels.duration_ns[one.kernel]) // one.share for one in work]
    whole = [one.share == 1 for one in work]
    return Coverage(
        joined=sum(whole),
        total=len(work),
        joined_ns=sum(ns for ns, own in zip(parts_ns, whole, strict=True) if own),
        total_ns=sum(parts_ns),
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
    """Of each kernel. A backward goes the other way: what comes before the products is the combine's, and the
    gradient of a gather is a write, which may stand between them, for those of the weights come late.
    """
    place = np.array([one.place for one in work], object)
    product, gather, write = (
        np.array([getattr(one.launch, name) for one in work], bool) for name in ("product", "gather", "write")
    )
    phase = np.full(len(work), OTHER, np.int64)
    phase[place == "router"] = ROUTER
    experts = np.flatnonzero(place == "experts")
    gather &= not backward
    found = phases_in_experts(row[experts], product[experts], gather[experts], write[experts])
    mirrored = np.choose(found, [ROUTER, COMBINE, EXPERTS, DISPATCH, SHARED, OTHER])
    phase[experts] = mirrored if backward else found
    block = np.flatnonzero(place == "block")
    for call in set(row[block].tolist()):
        rows = block[row[block] == call]
        products = np.flatnonzero(product[rows])
        if len(products):
            phase[rows[products[0] : products[-1] + 1]] = SHARED
    return phase
