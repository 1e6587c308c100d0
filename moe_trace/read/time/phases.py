"""Measure each phase of each MoE call on the host and on the device, forward and backward.

Sums are conserved, in whole nanoseconds:

    host     phases + gap = block
    device   phases + gap - overlap = span, from the first kernel of the block to its last
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable, placed_by_clock, routers_ranged, rows_in
from moe_trace.data.trace_json.coverage import Coverage, TimeCoverage
from moe_trace.data.trace_json.decoding import NO_LINK
from moe_trace.data.trace_json.events import EventTable, Kind, find_links
from moe_trace.data.trace_json.intervals import node_intervals, reached_by_group
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.time.blocks import Blocks, find_blocks
from moe_trace.read.time.columns import Columns
from moe_trace.read.time.phase_detection import PHASES, Steps, find_steps, phases_of_ranges

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Times(Columns):
    """Times of B calls x P phases in nanoseconds; `PHASES` names the columns."""

    host_ns: IntArray
    """[B, P] sum of the outermost operators and launches."""
    busy_ns: IntArray
    """[B, P] sum of the kernels, copies and memsets launched in the phase."""
    span_ns: IntArray
    """[B, P] from the phase's first kernel to its last; 0 without kernels."""
    kernels: IntArray
    """[B, P] number of kernels."""

    @property
    def ran(self) -> npt.NDArray[np.bool_]:
        """Whether anything ran, [B]. Compiled code has no operators of its own on the host."""
        return (self.host_ns.any(axis=1) | self.kernels.any(axis=1)).astype(bool)

    def unless_empty(self) -> Times | None:
        """Return None if nothing ran."""
        return self if self.ran.any() else None


CALL_COLUMNS = ("block_host_ns", "host_gap_ns", "device_span_ns", "device_gap_ns", "device_overlap_ns")
"""Names of the [B] arrays of `CallTimes`."""


@dataclass(frozen=True, eq=False)
class CallTimes(Columns):
    """Times of B calls, one per row of each array."""

    samples: CallTable
    forward: Times
    backward: Times | None
    """Times by Kineto's forward-backward links, or None if no link leads into these calls."""
    block_host_ns: IntArray
    """[B] duration of the block on the host."""
    host_gap_ns: IntArray
    """[B] host time outside operators: Python, and our own hooks."""
    device_span_ns: IntArray
    """[B] from the block's first kernel to its last."""
    device_gap_ns: IntArray
    """[B] time within the span in which none of the block's kernels ran."""
    device_overlap_ns: IntArray
    """[B] time by which its kernels overlap."""
    on_device: bool
    """Whether the work ran on a device; otherwise the operators' own times are the work."""
    coverage: TimeCoverage
    """Share of the whole trace that could be joined."""

    @property
    def device_known(self) -> bool:
        """Whether there are device times, with enough kernels joined."""
        return self.on_device and self.coverage.device_known

    def work_ns(self, times: Times) -> IntArray | None:
        """Return the work, [B, P]: device busy time on a device, else time in operators.

        None if the device's times are unknown.
        """
        if not self.on_device:
            return times.host_ns
        return times.busy_ns if self.device_known else None

    def us_in(self, calls: CallTable) -> Callable[[IntArray], npt.NDArray[np.float64]]:
        """Return a function that maps columns to the rows of another table, in µs; NaN for other calls."""
        rows = rows_in(calls, self.samples)

        def placed(values_ns: IntArray) -> npt.NDArray[np.float64]:
            column = np.full((len(rows), *values_ns.shape[1:]), np.nan)
            column[rows >= 0] = values_ns[rows[rows >= 0]] / 1000
            return column

        return placed

    def select(self, rows: npt.NDArray) -> CallTimes:
        """Select calls, in the order of `rows`."""
        chosen = super().select(rows)
        return chosen if chosen.backward is None else replace(chosen, backward=chosen.backward.unless_empty())


def measure_calls(calls: CallTable, events: EventTable, kernels: Kernels) -> CallTimes:
    """Measure every call that has its ranges in the trace, with operators inside them."""
    blocks, steps = _without_empty(find_blocks(calls, events), events)
    launched = steps.at(kernels.launch_thread, kernels.launch_ns)
    block_host_ns = blocks.end_ns - blocks.start_ns
    forward = _times(len(blocks), steps, kernels, launched)
    busy = launched >= 0
    span_ns, union_ns = span_and_union(
        len(blocks), steps.block[launched[busy]], kernels.start_ns[busy], kernels.duration_ns[busy]
    )
    backward, linked = _backward(blocks, steps, events, kernels)
    ranged = routers_ranged(calls)
    launches = _launches(steps, events, kernels)
    device = (events.kind == Kind.DEVICE).any() or launches.total
    return CallTimes(
        samples=blocks.samples,
        forward=forward,
        backward=backward if linked.known else None,
        block_host_ns=block_host_ns,
        host_gap_ns=block_host_ns - forward.host_ns.sum(1),
        device_span_ns=span_ns,
        device_gap_ns=span_ns - union_ns,
        device_overlap_ns=forward.busy_ns.sum(1) - union_ns,
        on_device=bool(device or (ranged & ~np.isnan(calls.duration_us("device", "router"))).any()),
        coverage=TimeCoverage(
            kernels=kernels.coverage,
            launches=launches,
            calls=Coverage(joined=len(blocks), total=int((ranged & ~placed_by_clock(calls)).sum())),
            backward=linked,
        ),
    )


def _without_empty(blocks: Blocks, events: EventTable) -> tuple[Blocks, Steps]:
    """Remove ranges without operators, which are on another thread than the work."""
    steps = find_steps(events, blocks)
    filled = np.bincount(steps.block, minlength=len(blocks)) > 0
    if filled.all():
        return blocks, steps
    blocks = blocks.select(filled)
    return blocks, find_steps(events, blocks)


def _launches(steps: Steps, events: EventTable, kernels: Kernels) -> Coverage:
    """Return how many launches of kernels in the steps have a kernel."""
    launching = np.array(["kernel" in (n := name.lower()) and "launch" in n for name in events.names], bool)
    rows = np.flatnonzero((events.kind == Kind.LAUNCH) & (events.link != NO_LINK))
    rows = rows[launching[events.name[rows]]]
    rows = rows[steps.at(events.thread[rows], events.start_ns[rows]) >= 0]
    return Coverage(joined=int((find_links(events.link[rows], kernels.link) >= 0).sum()), total=len(rows))


def _sums(rows: int, row: IntArray, phase: IntArray, values: IntArray) -> IntArray:
    table = np.zeros((rows, len(PHASES)), dtype=np.int64)
    np.add.at(table, (row, phase), values)
    return table


def _times(rows: int, steps: Steps, kernels: Kernels, launched: IntArray) -> Times:
    """Return times of the steps and their kernels; `launched` has the step of each kernel, or -1 for none."""
    known = launched >= 0
    row, phase = steps.block[launched[known]], steps.phase[launched[known]]
    times = device_times(rows, row, phase, kernels.start_ns[known], kernels.duration_ns[known])
    return replace(times, host_ns=_sums(rows, steps.block, steps.phase, steps.end_ns - steps.start_ns))


def device_times(
    rows: int,
    row: IntArray,
    phase: IntArray,
    start_ns: IntArray,
    duration_ns: IntArray,
    share: IntArray | int = 1,
) -> Times:
    """Return times of kernels by call and phase; a shared kernel counts with a part of its time."""
    return Times(
        host_ns=np.zeros((rows, len(PHASES)), dtype=np.int64),
        busy_ns=_sums(rows, row, phase, duration_ns // share),
        span_ns=_spans((rows, len(PHASES)), (row, phase), start_ns, start_ns + duration_ns),
        kernels=_sums(rows, row, phase, np.ones_like(start_ns)),
    )


def _spans(
    shape: tuple[int, ...], at: tuple[IntArray, ...], start_ns: IntArray, end_ns: IntArray
) -> IntArray:
    """Return the time from first start to last end of the events at each index; 0 without any."""
    first, last = np.full(shape, np.iinfo(np.int64).max), np.full(shape, np.iinfo(np.int64).min)
    np.minimum.at(first, at, start_ns)
    np.maximum.at(last, at, end_ns)
    return np.where(first <= last, last - first, 0)


def span_and_union(
    rows: int, row: IntArray, start: IntArray, duration: IntArray
) -> tuple[IntArray, IntArray]:
    """Return first start to last end, and the time covered by at least one interval, each [B]."""
    union = np.zeros(rows, dtype=np.int64)
    if not len(row):
        return union, union
    order = np.lexsort((start, row))
    row, start, end = row[order], start[order], (start + duration)[order]
    starts, ends = reached_by_group(row, start, end)
    np.add.at(union, row, ends - np.maximum(starts, np.concatenate([starts[:1], ends[:-1]])))
    return _spans((rows,), (row,), start, end), union


# -- backward -----------------------------------------------------------------------------------------


def _backward(
    blocks: Blocks, steps: Steps, events: EventTable, kernels: Kernels
) -> tuple[Times | None, Coverage]:
    """Return times of the backward nodes whose forward operator is in a block, by that operator's phase.

    Also return how many of all backward nodes could be joined with their forward operator.
    """
    forward = events.select(events.kind == Kind.FORWARD)
    backward = events.select(events.kind == Kind.BACKWARD)
    if not len(backward):
        return None, Coverage()
    forward_rows = find_links(backward.link, forward.link)
    linked = forward_rows >= 0
    nodes, found = node_intervals(events, backward)
    coverage = Coverage(joined=int((linked & found).sum()), total=len(backward))
    nodes, forward = nodes.select(linked), forward.select(forward_rows[linked])
    block = blocks.at(forward.thread, forward.start_ns)
    inside = block >= 0
    nodes, forward, block = nodes.select(inside), forward.select(inside), block[inside]
    # Compiled code has one node, which began where none of the steps inside it did.
    phase = phases_of_ranges(blocks, block, forward.start_ns)
    step = steps.at(forward.thread, forward.start_ns)
    known = np.flatnonzero(step >= 0)
    block[known], phase[known] = steps.block[step[known]], steps.phase[step[known]]
    thread = nodes.thread.astype(np.int64)
    as_steps = Steps(block, phase, thread, nodes.start_ns, nodes.end_ns, nodes.name)
    as_steps = _after_recompute(as_steps.select(np.lexsort((nodes.start_ns, thread))), blocks)
    launched = as_steps.at(kernels.launch_thread, kernels.launch_ns)
    return _times(len(blocks), as_steps, kernels, launched).unless_empty(), coverage


def _after_recompute(nodes: Steps, blocks: Blocks) -> Steps:
    """Remove from the nodes what gradient checkpointing reran inside them.

    Without reentry, the first node that needs a saved tensor reruns the whole checkpointed module before its
    own work: attention and MoE block, up to the block's end. This belongs to the recompute.
    """
    recomputed = np.flatnonzero(~blocks.samples.forward)
    node = nodes.at(blocks.thread[recomputed], blocks.start_ns[recomputed])
    inside = (node >= 0) & (blocks.end_ns[recomputed] <= nodes.end_ns[node])
    start_ns = nodes.start_ns.copy()
    np.maximum.at(start_ns, node[inside], blocks.end_ns[recomputed][inside])
    return replace(nodes, start_ns=start_ns)
