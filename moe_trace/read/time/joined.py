"""The times of the calls of several traces, or of several kinds of calls of one, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.calls.table import CallTable, routers_timed
from moe_trace.data.schema import Lost, Recording
from moe_trace.data.summary import SampleKey
from moe_trace.data.trace_json.coverage import TimeCoverage
from moe_trace.data.trace_json.events import EventTable
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.time.compiled import measure_compiled
from moe_trace.read.time.phase_detection import ROUTER
from moe_trace.read.time.phases import CALL_COLUMNS, CallTimes, Times, measure_calls
from moe_trace.timeline.correlate.reasons import FUSED


def measure_all(recording: Recording, events: EventTable, kernels: Kernels) -> CallTimes:
    """Times of every call of one trace: by its ranges, inside compiled code by the compiler's provenance."""
    by_ranges = measure_calls(recording.samples, events, kernels)
    compiled = measure_compiled(recording.calls, recording.compiled_graphs, events, kernels)
    return by_ranges if compiled is None else joined([by_ranges, compiled])


def routers_in_graphs_us(times: CallTimes) -> dict[SampleKey, float]:
    """Device time of the routers inside compiled code whose kernels are known."""
    rows = np.flatnonzero(times.samples.in_graph)
    keys, busy_ns = [*times.samples.call_keys()], times.forward.busy_ns[:, ROUTER]
    return {keys[row]: int(busy_ns[row]) / 1000 for row in rows.tolist()} if times.device_known else {}


def without_timed(lost: Lost, times: CallTimes) -> Lost:
    """The routers that merging found no time for, less those whose kernels are known by provenance."""
    calls = times.samples
    told = (
        int((calls.in_graph & ~routers_timed(calls)).sum()) if times.work_ns(times.forward) is not None else 0
    )
    left = lost.untimed.get(FUSED, 0) - told
    untimed = {why: count for why, count in lost.untimed.items() if why != FUSED}
    return replace(lost, untimed=untimed | ({FUSED: left} if left > 0 else {}))


def joined(parts: Sequence[CallTimes]) -> CallTimes:
    """The times of all calls."""
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
