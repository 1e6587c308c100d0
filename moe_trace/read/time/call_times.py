"""Combine the times of calls from several traces, or of several kinds of calls, into one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.calls.table import CallTable, routers_timed
from moe_trace.data.schema import Lost, Recording
from moe_trace.data.summary import SampleKey
from moe_trace.data.trace_json.coverage import TimeCoverage
from moe_trace.data.trace_json.events import EventTable, Kind, spans_ns
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.time.blocks import router_threads
from moe_trace.read.time.compiled import measure_compiled
from moe_trace.read.time.phase_detection import ROUTER
from moe_trace.read.time.phases import CALL_COLUMNS, CallTimes, Times, measure_calls
from moe_trace.timeline.correlate.reasons import FUSED


def measure_all(recording: Recording, events: EventTable, kernels: Kernels) -> CallTimes:
    """Measure every call of one trace by its ranges, or by the compiler's provenance inside compiled code."""
    by_ranges = measure_calls(recording.calls, events, kernels)
    compiled = measure_compiled(recording.calls, recording.compiled_graphs, events, kernels)
    return by_ranges if compiled is None else joined([by_ranges, compiled])


def routers_busy_us(
    calls: CallTable, times: CallTimes, events: EventTable, kernels: Kernels
) -> dict[SampleKey, float]:
    """Return the device time launched inside each router's host range; empty if the trace has no kernels.

    Inside a CUDA graph there is no such range: the time of the router's nodes, found while merging, is used
    instead. In compiled code it is the time of the router's kernels, if known.
    """
    if not (events.kind == Kind.DEVICE).any():
        return {}
    timed, total_ns = times.samples.call_keys(), np.concatenate([[0], np.cumsum(kernels.duration_ns)])
    joined = set(timed) if times.device_known else set()
    threads, measured_us = router_threads(calls, events).tolist(), calls.places.busy("router").tolist()
    bounds = spans_ns(calls.places.span("host", "router")).tolist()
    busy = {}
    for key, us, thread, (begin, end) in zip(calls.call_keys(), measured_us, threads, bounds, strict=True):
        if us == us:
            busy[key] = us
        elif thread >= 0 and key in joined:
            inside = kernels.within_ns(thread, begin, end)
            busy[key] = float(total_ns[inside.stop] - total_ns[inside.start]) / 1000
    compiled = np.flatnonzero(times.samples.in_graph & times.device_known).tolist()
    return busy | {timed[row]: int(times.forward.busy_ns[row, ROUTER]) / 1000 for row in compiled}


def without_timed(lost: Lost, times: CallTimes) -> Lost:
    """Subtract routers whose kernels are known by provenance from those that merging found no time for."""
    calls = times.samples
    known = (
        int((calls.in_graph & ~routers_timed(calls)).sum()) if times.work_ns(times.forward) is not None else 0
    )
    remaining = lost.untimed.get(FUSED, 0) - known
    untimed = {why: count for why, count in lost.untimed.items() if why != FUSED}
    return replace(lost, untimed=untimed | ({FUSED: remaining} if remaining > 0 else {}))


def joined(parts: Sequence[CallTimes]) -> CallTimes:
    """Concatenate the times of all calls."""
    if len(parts) == 1:
        return parts[0]
    backward = [p.backward for p in parts]
    return CallTimes(
        samples=CallTable.concatenated([p.samples for p in parts]),
        forward=Times.concatenated([p.forward for p in parts]),
        backward=None
        if all(b is None for b in backward)
        else Times.concatenated([b or _no_times(p) for b, p in zip(backward, parts, strict=True)]),
        on_device=any(p.on_device for p in parts),
        coverage=sum((p.coverage for p in parts), TimeCoverage()),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in CALL_COLUMNS},
    )


def _no_times(part: CallTimes) -> Times:
    return Times(**{name: np.zeros_like(part.forward.host_ns) for name in Times.__dataclass_fields__})
