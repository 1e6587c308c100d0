"""The counters of one step, for a figure: the same as those that `timeline/counter_tracks.py` writes."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.load_stats import describe_load
from moe_trace.data.schema import RoutingSample, Span
from moe_trace.read.time.lanes import Clock
from moe_trace.timeline.counter_tracks import FIGURES
from moe_trace.timeline.replay_slices import PlacedCall

COUNTED_MAX = 1500

CounterTrack = tuple[str, list[tuple[Span, float]]]
"""A figure's name, and for each call the interval of its MoE block with the figure's value."""


def counter_tracks(
    samples: Sequence[RoutingSample], clock: Clock, window_ns: tuple[int, int]
) -> list[CounterTrack]:
    """The figures that are not 0 throughout, over the calls that touch the window."""
    calls = [call for s in samples if (call := _placed(s, clock)) is not None]
    low, high = window_ns[0] / 1000, window_ns[1] / 1000
    calls = [call for call in calls if call.moe.end_us >= low and call.moe.start_us <= high]
    calls.sort(key=lambda call: call.moe.start_us)
    calls = calls[:: max(1, -(-len(calls) // COUNTED_MAX))]
    tracks = []
    for name, figure in FIGURES.items():
        points = [(c.moe, float(v)) for c in calls if (v := figure(c)) is not None]
        if any(value for _, value in points):
            tracks.append((name, points))
    return tracks


def _placed(sample: RoutingSample, clock: Clock) -> PlacedCall | None:
    placement = sample.placement
    spans = None if placement is None else placement.device if clock == "device" else placement.host
    if not spans or "router" not in spans:
        return None
    return PlacedCall(sample, describe_load(sample.assignments), spans, clock)
