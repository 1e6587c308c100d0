"""The calls of a trace as rows: where each MoE block, router and experts module stands, on which thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import Placement, RoutingSample
from moe_trace.read.file.events import EventTable, bounds_ns
from moe_trace.read.file.launches import RangeThreads


@dataclass(frozen=True)
class Blocks:
    """B calls that have ranges in the trace, sorted by thread and time. [B] arrays, nanoseconds."""

    samples: tuple[RoutingSample, ...]
    thread: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    router_ns: npt.NDArray[np.int64]
    """[B, 2] start and end."""
    experts_ns: npt.NDArray[np.int64]
    """[B, 2]; without a range of the experts: all that follows the router in the block."""

    def __len__(self) -> int:
        return len(self.samples)


def find_blocks(samples: Sequence[RoutingSample], events: EventTable) -> Blocks:
    """The samples whose ranges the trace holds."""
    threads = RangeThreads(events)
    found = []
    for sample in samples:
        thread = threads.of(sample)
        if thread is not None and sample.placement is not None:
            found.append((thread, _bounds(sample.placement), sample))
    found.sort(key=lambda row: (row[0], row[1][0]))
    bounds = np.array([row[1] for row in found], np.int64).reshape(len(found), 6)
    return Blocks(
        samples=tuple(row[2] for row in found),
        thread=np.array([row[0] for row in found], np.int64),
        start_ns=bounds[:, 0],
        end_ns=bounds[:, 1],
        router_ns=bounds[:, 2:4],
        experts_ns=bounds[:, 4:6],
    )


def _bounds(placement: Placement) -> tuple[int, ...]:
    host = placement.host
    router = bounds_ns(host["router"])
    start, end = bounds_ns(host["block"]) if "block" in host else _hull(map(bounds_ns, host.values()))
    experts = bounds_ns(host["experts"]) if "experts" in host else (router[1], max(router[1], end))
    return (start, end, *router, *experts)


def _hull(bounds: Iterable[tuple[int, int]]) -> tuple[int, int]:
    starts, ends = zip(*bounds, strict=True)
    return min(starts), max(ends)
