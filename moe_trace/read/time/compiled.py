"""Phases of calls inside compiled code, with and without CUDA graphs, by the compiler's provenance.

The phases of a layer's launches follow from the same structure as those of eager operators, with the experts'
matrix products as landmarks. The time of a kernel that was fused from several phases, layers or the rest of
the model is divided equally among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.trace_json.coverage import Coverage, TimeCoverage
from moe_trace.data.trace_json.events import EventTable
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.time.columns import Columns
from moe_trace.read.time.phase_detection import (
    COMBINE,
    DISPATCH,
    EXPERTS,
    OTHER,
    ROUTER,
    SHARED,
    between_products,
    phases_in_experts,
)
from moe_trace.read.time.phases import CallTimes, Times, device_times, span_and_union
from moe_trace.timeline.correlate.compiled_calls import Work, join_compiled

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PhasedKernels(Columns):
    """Kernels of the calls inside compiled code, sorted by call and place. Arrays are [N]."""

    call: IntArray
    """Row in the table of calls."""
    kernel: IntArray
    """Row in the table of kernels."""
    share: IntArray
    """Number of parts of the model that share the kernel's time equally."""
    phase: IntArray


def phased_kernels(work: Sequence[Work], *, backward: bool = False) -> PhasedKernels:
    """Return the kernels that ran for the calls, with the phase of each."""
    work = sorted(work, key=lambda item: (item.call, item.step))
    call, kernel, share = (
        np.array([getattr(item, name) for item in work], np.int64) for name in ("call", "kernel", "share")
    )
    return PhasedKernels(call, kernel, share, _phases(work, call, backward=backward))


def measure_compiled(
    calls: CallTable, graphs: Sequence[CompiledGraph], events: EventTable, kernels: Kernels
) -> CallTimes | None:
    """Measure the calls inside compiled code whose kernels are known, or return None if there are none."""
    join = join_compiled(calls, graphs, events, kernels)
    if join is None:
        return None
    on_device, kernels = join.on_device, join.kernels
    forward = phased_kernels(join.forward())
    backward = phased_kernels(join.backward(), backward=True)
    timed, row = np.unique(forward.call, return_inverse=True)
    duration_ns = kernels.duration_ns[forward.kernel]
    span, union = span_and_union(len(timed), row, kernels.start_ns[forward.kernel], duration_ns)
    total_ns = np.zeros(len(timed), np.int64)
    np.add.at(total_ns, row, duration_ns)
    times = _times(forward, timed, kernels, on_device=on_device)
    gap = span - union + total_ns - (times.busy_ns if on_device else times.host_ns).sum(1)
    nothing = np.zeros(len(timed), np.int64)
    return CallTimes(
        samples=calls.take(timed),
        forward=times,
        backward=_times(backward, timed, kernels, on_device=on_device).unless_empty(),
        block_host_ns=nothing if on_device else span,
        host_gap_ns=nothing if on_device else gap,
        device_span_ns=span if on_device else nothing,
        device_gap_ns=gap if on_device else nothing,
        device_overlap_ns=total_ns - union if on_device else nothing,
        on_device=on_device,
        coverage=TimeCoverage(
            compiled=Coverage(joined=len(timed), total=len(join.inside)),
            unshared=_unshared(PhasedKernels.concatenated([forward, backward]), kernels),
            cpp_kernels=Coverage() if on_device else join.cpp_kernels(),
        ),
    )


def _unshared(work: PhasedKernels, kernels: Kernels) -> Coverage:
    """Return how much of the work is in kernels that belong to one part of the model."""
    parts_ns, is_unshared = kernels.duration_ns[work.kernel] // work.share, work.share == 1
    return Coverage(
        joined=int(is_unshared.sum()),
        total=len(is_unshared),
        joined_ns=int(parts_ns[is_unshared].sum()),
        total_ns=int(parts_ns.sum()),
    )


def _times(work: PhasedKernels, timed: IntArray, kernels: Kernels, *, on_device: bool) -> Times:
    """Sum each call's kernels by phase, [timed, P]; those on a CPU are sequential operators of the host."""
    work = work.select(np.isin(work.call, timed))
    row, start_ns = np.searchsorted(timed, work.call), kernels.start_ns[work.kernel]
    duration_ns = kernels.duration_ns[work.kernel]
    times = device_times(len(timed), row, work.phase, start_ns, duration_ns, work.share)
    if on_device:
        return times
    return Times(host_ns=times.busy_ns, **dict.fromkeys(("busy_ns", "span_ns", "kernels"), times.host_ns))


def _phases(work: Sequence[Work], call: IntArray, *, backward: bool) -> IntArray:
    """Return the phase of each kernel. A backward runs in reverse: what precedes the products belongs to the
    combine. The gradient of a gather is a write, which may occur between products, as weights' gradients come
    late."""
    place = np.array([item.place for item in work], object)
    product, gather, write = (
        np.array([getattr(item.launch, name) for item in work], bool)
        for name in ("product", "gather", "write")
    )
    phase = np.full(len(work), OTHER, np.int64)
    phase[place == "router"] = ROUTER
    experts = np.flatnonzero(place == "experts")
    gather &= not backward
    found = phases_in_experts(call[experts], product[experts], gather[experts], write[experts])
    mirrored = np.choose(found, [ROUTER, COMBINE, EXPERTS, DISPATCH, SHARED, OTHER])
    phase[experts] = mirrored if backward else found
    block = np.flatnonzero(place == "block")
    phase[block[between_products(call[block], product[block])]] = SHARED
    return phase
