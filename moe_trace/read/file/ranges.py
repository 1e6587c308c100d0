"""Which routers' ranges the trace holds, and the kernels that were launched inside them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import RoutingSample, range_name
from moe_trace.data.summary import SampleKey
from moe_trace.data.trace_json.events import EventTable, Kind, spans_ns, to_ns
from moe_trace.data.trace_json.kernels import Kernels


class RangeThreads:
    """The thread (an index of the table) on which a range of ours was recorded."""

    def __init__(self, events: EventTable) -> None:
        ours = events.select(events.kind == Kind.RANGE)
        self._thread = {
            (events.names[name], start): thread
            for name, start, thread in zip(
                ours.name.tolist(), ours.start_ns.tolist(), ours.thread.tolist(), strict=True
            )
        }

    def of(self, calls: CallTable) -> npt.NDArray[np.int64]:
        """[N] of each call's router; -1 where the trace does not hold the range."""
        spans = calls.places.span("host", "router")
        names = [range_name("router", key.site) for key in calls.keys]
        starts = zip(calls.router.tolist(), to_ns(spans[:, 0]).tolist(), strict=True)
        threads = [self._thread.get((names[router], start), -1) for router, start in starts]
        return np.where(np.isnan(spans[:, 0]), -1, np.array(threads, np.int64))


def router_busy_us(
    samples: Sequence[RoutingSample], events: EventTable, kernels: Kernels, joined: Collection[SampleKey]
) -> dict[SampleKey, float]:
    """Device time launched inside each router's host range; empty where the trace has no kernels.

    Inside a CUDA graph there is no such range: what merging told of the router's nodes stands there.

    Args:
        joined: the calls whose kernels are known.
    """
    if not (events.kind == Kind.DEVICE).any():
        return {}
    calls = CallTable.of(samples)
    threads, told = RangeThreads(events).of(calls), calls.places.busy("router").tolist()
    bounds = spans_ns(calls.places.span("host", "router")).tolist()
    total_ns = np.concatenate([[0], np.cumsum(kernels.duration_ns)])
    busy = {}
    for key, us, thread, (begin, end) in zip(calls.call_keys(), told, threads.tolist(), bounds, strict=True):
        if us == us:
            busy[key] = us
        elif thread >= 0 and key in joined:
            inside = kernels.within_ns(thread, begin, end)
            busy[key] = float(total_ns[inside.stop] - total_ns[inside.start]) / 1000
    return busy
