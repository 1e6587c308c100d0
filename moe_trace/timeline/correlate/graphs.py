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
from moe_trace.data.schema import Placement, Recording, Span
from moe_trace.timeline.correlate.calls import Placed, TraceClock
from moe_trace.timeline.correlate.device_forwards import DeviceForwards
from moe_trace.timeline.correlate.host_forwards import HostForwards
from moe_trace.timeline.correlate.launches import Launches
from moe_trace.timeline.correlate.missing import MissingRanges
from moe_trace.timeline.correlate.reasons import NO_RANGE, OTHER_TRACE
from moe_trace.timeline.correlate.replays import Found, Replays
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
    samples, found, why_untimed = list(placed.samples), dict[int, Found](), dict[int, str]()
    for recording in recordings:
        names = {router.name for router in recording.routers}
        own = {row: one for row, one in enumerate(samples) if one.in_graph and one.name in names}
        replays = Replays(recording, launches, TraceClock(base_time_ns, window))
        seen = HostForwards(ranges, {one.thread for one in own.values()}, replays)
        counted = DeviceForwards(own.values(), replays)
        for row, sample in own.items():
            place = found[row] = (seen if sample.host_start_ns else counted).placement(sample)
            if isinstance(place, Placement):
                why_untimed[row] = replays.why_untimed(place)
    rows = [row for row in range(len(samples)) if found.get(row) != OTHER_TRACE]
    known = {row: place for row, place in found.items() if isinstance(place, Placement)}
    places = [known.get(row, samples[row].placement) for row in rows]
    table = placed.samples.take(np.array(rows, np.int64))
    table = timed(replace(table, places=Places.of(places, len(rows))))
    untimed = [why_untimed.get(row) for row, told in zip(rows, routers_timed(table), strict=True) if not told]
    unplaced = Counter(
        missing.why_no_forward(samples[row].thread) if why == NO_RANGE else why
        for row, why in found.items()
        if isinstance(why, str) and why != OTHER_TRACE
    )
    return replace(
        placed, samples=table, unplaced=dict(unplaced), untimed=dict(Counter(filter(None, untimed)))
    )
