"""The calls of compiled graphs in a trace, and on a CPU what ran in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.trace_json.coverage import Coverage
from moe_trace.data.trace_json.decoding import NO_LINK
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.intervals import Intervals, outermost_slices
from moe_trace.data.trace_json.kernels import Kernels

IntArray = npt.NDArray[np.int64]
CALL = "## Call CompiledFxGraph"


def compiled_calls(events: EventTable) -> EventTable:
    """Inductor's operators, one a call of a compiled graph, sorted by thread and time."""
    ops = events.select((events.kind == Kind.OP) & named(events, CALL))
    return ops.select(np.lexsort((ops.start_ns, ops.thread)))


def key_of(call: str) -> str:
    """Inductor's key of the graph that an operator of that name calls; empty where it tells none."""
    key = call.removeprefix(CALL).strip(" #")
    return "" if key == "None" else key


def operators_of_calls(events: EventTable) -> Kernels:
    """The outermost operators inside calls of compiled graphs, as the kernels of a CPU."""
    calls = compiled_calls(events)
    ops = events.select((events.kind == Kind.OP) & ~named(events, CALL))
    at = _Stretches(calls.thread.astype(np.int64), calls.start_ns, calls.end_ns).at(
        ops.thread, ops.start_ns, ops.end_ns
    )
    ops = outermost_slices(ops.select(at >= 0))
    return Kernels(
        launch_thread=ops.thread,
        launch_ns=ops.start_ns,
        start_ns=ops.start_ns,
        duration_ns=ops.duration_ns,
        name=ops.name,
        link=np.full(len(ops), NO_LINK),
        stream=ops.thread,
        coverage=Coverage(),
    )


@dataclass(frozen=True, eq=False)
class _Stretches(Intervals):
    """Calls, which do not overlap on their thread."""

    thread: IntArray
    start_ns: IntArray
    end_ns: IntArray


def named(events: EventTable, prefix: str) -> npt.NDArray[np.bool_]:
    """Which events have a name that begins so."""
    named = np.array([name.startswith(prefix) for name in events.names], bool)
    return named[events.name] if len(named) else np.zeros(len(events), bool)
