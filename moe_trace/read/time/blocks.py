"""Calls of a trace as rows, with the thread and times of each MoE block, router and experts module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import RANGE_KINDS, RangeKind, RoutingSample, range_name
from moe_trace.data.trace_json.events import EventTable, Kind, spans_ns, to_ns
from moe_trace.data.trace_json.intervals import Intervals
from moe_trace.read.time.columns import Columns


@dataclass(frozen=True, eq=False)
class Blocks(Columns, Intervals):
    """B calls with ranges in the trace, sorted by thread and time. Arrays are [B], times in nanoseconds."""

    samples: CallTable
    thread: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    router_ns: npt.NDArray[np.int64]
    """[B, 2] start and end."""
    experts_ns: npt.NDArray[np.int64]
    """[B, 2]; without a range of the experts, from the end of the router to that of the block."""

    def __len__(self) -> int:
        return len(self.samples)


def find_blocks(samples: Sequence[RoutingSample], events: EventTable) -> Blocks:
    """Return the samples whose ranges the trace contains."""
    calls = CallTable.of(samples)
    thread = router_threads(calls, events)
    calls, thread = calls.take(thread >= 0), thread[thread >= 0]
    router = spans_ns(calls.places.span("host", "router"))
    hull = host_bounds_ns(calls)
    block, has_block = _host_ns(calls, "block")
    start, end = np.where(has_block, block.T, hull.T)
    experts, has_experts = _host_ns(calls, "experts")
    after = np.stack([router[:, 1], np.maximum(router[:, 1], end)], axis=1)
    experts = np.where(has_experts[:, None], experts, after)
    blocks = Blocks(calls, thread, start, end, router_ns=router, experts_ns=experts)
    return blocks.select(np.lexsort((start, thread)))


def router_threads(calls: CallTable, events: EventTable) -> npt.NDArray[np.int64]:
    """Return the thread of each router's range as an index of the table, [N], or -1 if it is missing."""
    router_ranges = events.select(events.kind == Kind.RANGE)
    names = [events.names[name] for name in router_ranges.name.tolist()]
    by_range = dict(
        zip(
            zip(names, router_ranges.start_ns.tolist(), strict=True),
            router_ranges.thread.tolist(),
            strict=True,
        )
    )
    start_us = calls.places.span("host", "router")[:, 0]
    names_wanted = [range_name("router", key.site) for key in calls.keys]
    starts = zip(calls.router.tolist(), to_ns(start_us).tolist(), strict=True)
    threads = [by_range.get((names_wanted[router], start), -1) for router, start in starts]
    return np.where(np.isnan(start_us), -1, np.array(threads, np.int64))


def host_bounds_ns(calls: CallTable) -> npt.NDArray[np.int64]:
    """Return the first start and the last end of all host ranges of each call, [N, 2]."""
    low, high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    starts, ends = np.full(len(calls), low), np.full(len(calls), high)
    for kind in RANGE_KINDS:
        bounds, has_range = _host_ns(calls, kind)
        starts = np.where(has_range, np.minimum(starts, bounds[:, 0]), starts)
        ends = np.where(has_range, np.maximum(ends, bounds[:, 1]), ends)
    return np.stack([starts, ends], axis=1)


def _host_ns(calls: CallTable, kind: RangeKind) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    spans = calls.places.span("host", kind)
    return spans_ns(spans), ~np.isnan(spans[:, 0])
