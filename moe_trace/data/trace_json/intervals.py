"""Slices of a thread: which holds a moment, which is held by no other, and which are backward nodes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moe_trace.data.trace_json.events import EventTable, Kind


class Intervals:
    """Rows that do not overlap on their thread, sorted by thread and start."""

    thread: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]

    def at(
        self, thread: npt.NDArray, start_ns: npt.NDArray, end_ns: npt.NDArray | None = None
    ) -> npt.NDArray[np.int64]:
        """[N] the row that holds each moment of a thread, or stretch of time; -1 where none does."""
        found = np.full(len(start_ns), -1, dtype=np.int64)
        end_ns = start_ns if end_ns is None else end_ns
        bounds = np.flatnonzero(np.diff(self.thread, prepend=-1, append=-1))  # threads count from 0
        for low, high in itertools.pairwise(bounds):
            mine = np.flatnonzero(thread == self.thread[low])
            row = low + np.searchsorted(self.start_ns[low:high], start_ns[mine], "right") - 1
            inside = (row >= low) & (end_ns[mine] <= self.end_ns[row])
            found[mine[inside]] = row[inside]
        return found


def is_outermost(host: EventTable, block: npt.NDArray) -> npt.NDArray[np.bool_]:
    """Whether no other row of the same block holds the row; rows are sorted by start, longest first."""
    if not len(host):
        return np.zeros(0, dtype=bool)
    # One running maximum for all blocks: each is moved behind all before it.
    origin = int(host.start_ns.min())
    stride = int(host.end_ns.max()) - origin + 1
    starts = host.start_ns - origin + block * stride
    ends = np.maximum.accumulate(host.end_ns - origin + block * stride)
    outermost = np.ones(len(host), dtype=bool)
    outermost[1:] = starts[1:] >= ends[:-1]
    return outermost


def outermost_slices(slices: EventTable) -> EventTable:
    """The slices that no other slice of their thread holds."""
    ordered = slices.select(np.lexsort((-slices.duration_ns, slices.start_ns, slices.thread)))
    return ordered.select(is_outermost(ordered, ordered.thread.astype(np.int64)))


def node_intervals(events: EventTable, backward: EventTable) -> tuple[EventTable, npt.NDArray[np.bool_]]:
    """The backward nodes as slices, and which were found: a flow ends at the start of its node, the longest
    operator there.
    """
    ops = events.select(events.kind == Kind.OP)
    ops = ops.select(np.lexsort((-ops.duration_ns, ops.start_ns, ops.thread)))
    origin = int(min(ops.start_ns.min(initial=0), backward.start_ns.min(initial=0)))
    stride = int(max(ops.start_ns.max(initial=0), backward.start_ns.max(initial=0))) - origin + 1
    key = ops.start_ns - origin + ops.thread.astype(np.int64) * stride
    wanted = backward.start_ns - origin + backward.thread.astype(np.int64) * stride
    at = np.searchsorted(key, wanted)
    found = at < len(ops)
    found[found] = key[at[found]] == wanted[found]
    duration = np.zeros(len(backward), dtype=np.int64)
    duration[found] = ops.duration_ns[at[found]]
    return replace(backward, duration_ns=duration), found
