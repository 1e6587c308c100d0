"""The counters of one step, for a figure: the same as those that `timeline/counter_tracks.py` writes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import RoutingSample, Span
from moe_trace.read.time.lanes import Clock
from moe_trace.timeline.placed_calls import FIGURES, PlacedCalls

COUNTED_MAX = 1500

CounterTrack = tuple[str, list[tuple[Span, float]]]
"""A figure's name, and for each call the interval of its MoE block with the figure's value."""


def counter_tracks(
    samples: Sequence[RoutingSample], clock: Clock, window_ns: tuple[int, int]
) -> list[CounterTrack]:
    """The figures that are not 0 throughout, over the calls that touch the window."""
    calls = CallTable.of(samples)
    calls = calls.take(~np.isnan(calls.duration_us(clock, "router")))
    placed = PlacedCalls.on(np.full(len(calls), clock == "device"), calls)
    low, high = window_ns[0] / 1000, window_ns[1] / 1000
    rows = np.flatnonzero((placed.moe.sum(1) >= low) & (placed.moe[:, 0] <= high))
    rows = rows[:: max(1, -(-len(rows) // COUNTED_MAX))]
    tracks = []
    for name, figure in FIGURES.items():
        values = figure(placed)[rows]
        told = values == values
        if values[told].any():
            spans = [Span(*span) for span in placed.moe[rows[told]].tolist()]
            tracks.append((name, list(zip(spans, map(float, values[told]), strict=True))))
    return tracks
