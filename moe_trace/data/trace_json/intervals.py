"""Interval queries on the slices of threads: containment, outermost slices, backward nodes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moe_trace.data.trace_json.events import EventTable, Kind


class Intervals:
    """Rows that do not overlap within a thread, sorted by thread and start."""

    thread: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]

    def at(
        self, thread: npt.NDArray, start_ns: npt.NDArray, end_ns: npt.NDArray | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the row that contains each moment, or time span, of a thread, [N]; -1 where none does."""
        found = np.full(len(start_ns), -1, dtype=np.int64)
        end_ns = start_ns if end_ns is None else end_ns
        bounds = np.flatnonzero(np.diff(self.thread, prepend=-1, append=-1))  # threads count from 0
        for low, high in itertools.pairwise(bounds):
            on_thread = np.flatnonzero(thread == self.thread[low])
            row = low + np.searchsorted(self.start_ns[low:high], start_ns[on_thread], "right") - 1
            inside = (row >= low) & (end_ns[on_thread] <= self.end_ns[row])
            found[on_thread[inside]] = row[inside]
        return found


def is_outermost(host: EventTable, block: npt.NDArray) -> npt.NDArray[np.bool_]:
    """Return whether no other row of its block contains a row; rows are sorted by start, longest first."""
    starts, ends = reached_by_group(block, host.start_ns, host.end_ns)
    outermost = np.ones(len(host), dtype=bool)
    outermost[1:] = starts[1:] >= ends[:-1]
    return outermost


def reached_by_group(
    group: npt.NDArray, start_ns: npt.NDArray[np.int64], end_ns: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the start and the latest end so far in the group of each row, [N]; sorted by group and start.

    Groups are shifted past each other, so that one running maximum serves all.
    """
    origin = int(start_ns.min(initial=np.iinfo(np.int64).max))
    rank = np.cumsum(np.diff(group, prepend=group[:1]) != 0)
    shift = rank * (int(end_ns.max(initial=origin)) - origin + 1) - origin
    return start_ns + shift, np.maximum.accumulate(end_ns + shift)


def outermost_slices(slices: EventTable) -> EventTable:
    """Return the slices that no other slice of their thread contains."""
    ordered = slices.select(np.lexsort((-slices.duration_ns, slices.start_ns, slices.thread)))
    return ordered.select(is_outermost(ordered, ordered.thread.astype(np.int64)))


def node_intervals(events: EventTable, backward: EventTable) -> tuple[EventTable, npt.NDArray[np.bool_]]:
    """Return the backward nodes as slices, and whether each was found.

    A flow ends at the start of its node, which is the longest operator there.
    """
    ops = events.select(events.kind == Kind.OP)
    ops = ops.select(np.lexsort((-ops.duration_ns, ops.start_ns, ops.thread)))
    origin = int(min(ops.start_ns.min(initial=0), backward.start_ns.min(initial=0)))
    stride = int(max(ops.start_ns.max(initial=0), backward.start_ns.max(initial=0))) - origin + 1
    key = ops.start_ns - origin + ops.thread.astype(np.int64) * stride
    wanted_key = backward.start_ns - origin + backward.thread.astype(np.int64) * stride
    rows = np.searchsorted(key, wanted_key)
    found = rows < len(ops)
    found[found] = key[rows[found]] == wanted_key[found]
    duration = np.zeros(len(backward), dtype=np.int64)
    duration[found] = ops.duration_ns[rows[found]]
    return replace(backward, duration_ns=duration), found
