"""Spans of routers and experts inside compiled code without a CUDA graph, from the kernels of its calls.

This reads all events, which takes longer than the range search that a merge otherwise consists of. It is done
only if the recording has the compiler's lists of launches, a router has no time yet, and the trace has calls
of compiled graphs and kernels, those of a GPU or the ranges of Inductor's C++ kernels. Reports use the same
join, so lanes and phases agree. On a CPU the kernels are host operators, and so are the spans. A failure here
must not cost the trace: it is merged without these lanes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.calls.placements import Floats, Places, Side
from moe_trace.data.calls.table import CallTable, Mask, routers_timed
from moe_trace.data.compiled_graph import CompiledGraph, Place
from moe_trace.data.errors import TraceFileError
from moe_trace.data.trace_json.events import EventTable, EventTableBuilder
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.data.trace_json.stream import JsonStream
from moe_trace.data.trace_json.windows import EventBytes
from moe_trace.timeline.correlate.compiled_calls import CALL, CompiledCalls, Work, join_compiled

_CALL, _KERNELS = b'"%b' % CALL.encode(), (b'"kernel"', b"_cpp_")
_LANES: tuple[Place, ...] = ("router", "experts")


def with_compiled_spans(calls: CallTable, graphs: Sequence[CompiledGraph], events: EventBytes) -> CallTable:
    """Add spans of router and experts to the calls of compiled code whose kernels are known.

    Args:
        calls: placed by the forward, or by the graph's launch.
        graphs: the compiler's lists, of all tracers.
    """
    known = [graph for graph in graphs if graph.launches]
    try:
        return _joined(calls, known, events)
    except Exception as error:
        warnings.warn(
            f"the lanes of routers and experts in compiled code could not be made ({error!r}); the trace has "
            "all else",
            RuntimeWarning,
            stacklevel=2,
        )
        return calls


def _joined(calls: CallTable, graphs: Sequence[CompiledGraph], events: EventBytes) -> CallTable:
    untimed = calls.in_graph & calls.places.placed & ~routers_timed(calls)
    if not graphs or not untimed.any() or not _holds(events, _CALL):
        return calls
    if not any(_holds(events, text) for text in _KERNELS):
        return calls
    table = _read(events)
    join = None if table is None else join_compiled(calls, graphs, table, find_kernels(table))
    if table is None or join is None:
        return calls
    return replace(calls, places=_with_spans(calls.places, untimed, join))


def _holds(events: EventBytes, text: bytes) -> bool:
    return any(w.buffer.find(text, w.since, w.filled) >= 0 for w in events.windows())


def _read(events: EventBytes) -> EventTable | None:
    """Return the events; None if they cannot be read, which must not fail the merge: readers report it."""
    events.file.seek(events.start - 1)
    builder = EventTableBuilder()
    try:
        builder.read(JsonStream(events.file.read, events.file.name))
    except TraceFileError:
        return None
    return builder.build()


def _with_spans(places: Places, rows: Mask, join: CompiledCalls) -> Places:
    work = [item for item in join.forward() if rows[item.call]]
    spans, busy = dict(places.spans), dict(places.busy_us)
    side: Side = "device" if join.on_device else "host"
    for kind in _LANES:
        span, busy_us = _spans_of([item for item in work if item.place == kind], len(places), join)
        known = ~np.isnan(busy_us)
        if known.any():
            spans[side, kind] = np.where(known[:, None], span, places.span(side, kind))
            busy[kind] = np.where(known, busy_us, places.busy(kind))
    return Places(places.placed, spans, busy)


def _spans_of(work: Sequence[Work], size: int, join: CompiledCalls) -> tuple[Floats, Floats]:
    """Return first to last kernel of each call, [size, 2], and their sum, [size]; NaN where there is none."""
    row, kernel, share = (
        np.array([getattr(item, name) for item in work], np.int64) for name in ("call", "kernel", "share")
    )
    start_ns, duration_ns = join.kernels.start_ns[kernel], join.kernels.duration_ns[kernel]
    first, last = np.full(size, np.iinfo(np.int64).max), np.zeros(size, np.int64)
    np.minimum.at(first, row, start_ns)
    np.maximum.at(last, row, start_ns + duration_ns)
    busy_ns = np.bincount(row, duration_ns // share, size)
    has_kernels = np.bincount(row, minlength=size) > 0
    us = np.stack([first, last - first, busy_ns], axis=1) / 1000
    us[~has_kernels] = np.nan
    return us[:, :2], us[:, 2]
