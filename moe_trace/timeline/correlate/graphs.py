"""Place calls that were made inside compiled code and CUDA graphs: at the launch of their graph.

    host saw the forward    enclosure: the range that our own hook opened round it, and the launches in it
    host saw nothing        the device's own count: copied at each mark, on the stream that it was counted on

Both are exact or refused; what is refused is counted with its reason. Inside a launch, router and experts
are told by the ids of their nodes, or by their positions in the chain that was captured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moe_trace.data.calls.placements import Places
from moe_trace.data.calls.table import CallTable, routers_timed
from moe_trace.data.schema import Placement, Recording, RoutingSample, Span
from moe_trace.timeline.correlate.calls import Placed
from moe_trace.timeline.correlate.device_forwards import DeviceForwards
from moe_trace.timeline.correlate.host_forwards import HostForwards
from moe_trace.timeline.correlate.launches import Launches
from moe_trace.timeline.correlate.missing import MissingRanges
from moe_trace.timeline.correlate.reasons import NO_RANGE, OTHER_TRACE
from moe_trace.timeline.correlate.replays import Replays, TraceClock
from moe_trace.timeline.correlate.scan import RangeEvent


def place_in_graphs(
    placed: Placed,
    recordings: Sequence[Recording],
    *,
    ranges: Sequence[RangeEvent],
    launches: Launches,
    missing: MissingRanges,
    base_time_ns: int,
    window: Span | None,
    timed: Callable[[CallTable], CallTable] = lambda calls: calls,
) -> Placed:
    """Place what was left without a place because it was made inside graphs.

    Args:
        placed: the outcome for all calls of this trace.
        recordings: of tracers that share no module path.
        launches: of graphs and copies in the trace (`read_launches`).
        base_time_ns, window: the trace's `baseTimeNanoseconds`, and what the profiler recorded, if it tells.
        timed: gives routers a time that their place does not tell.
    """
    samples, kept = list(placed.samples), dict[int, Placement | None]()
    unplaced, why_untimed = Counter[str](), dict[int, str]()
    owners = {router.name: i for i, recording in enumerate(recordings) for router in recording.routers}
    clock = TraceClock(base_time_ns, window)
    places = [_Places(one, samples, ranges, launches, clock) for one in recordings]
    for row, sample in enumerate(samples):
        of_tracer = places[owners[sample.name]]
        found = of_tracer.of(sample) if sample.in_graph else None
        if found == OTHER_TRACE:
            continue
        kept[row] = found if isinstance(found, Placement) else sample.placement
        if isinstance(found, Placement):
            why_untimed[len(kept) - 1] = of_tracer.why_untimed(found)
        elif found is not None:
            unplaced[missing.why_no_forward(sample.thread) if found == NO_RANGE else found] += 1
    table = placed.samples.take(np.array([*kept], np.int64))
    table = timed(replace(table, places=Places.of(kept.values(), len(kept))))
    told = routers_timed(table)
    untimed = Counter(why for row, why in why_untimed.items() if not told[row])
    return replace(placed, samples=table, unplaced=dict(unplaced), untimed=dict(untimed))


class _Places:
    """The places of one tracer's calls."""

    def __init__(
        self,
        recording: Recording,
        samples: Sequence[RoutingSample],
        ranges: Sequence[RangeEvent],
        launches: Launches,
        clock: TraceClock,
    ) -> None:
        names = {router.name for router in recording.routers}
        own = [sample for sample in samples if sample.name in names and sample.in_graph]
        self._replays = Replays(recording, launches, clock)
        self._forwards = HostForwards(ranges, {sample.thread for sample in own}, self._replays)
        self._segments = DeviceForwards(own, self._replays)

    def of(self, sample: RoutingSample) -> Placement | str:
        """Its placement, or why it has none."""
        return (self._forwards if sample.host_start_ns else self._segments).placement(sample)

    def why_untimed(self, placement: Placement) -> str:
        """Why the router has no time of its own."""
        return self._replays.why_untimed(placement)
