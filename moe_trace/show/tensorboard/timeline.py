"""One step of a trace: its lanes and counters within a window, and the kernels or operators in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.read.time.step_timeline import Clock, Lanes, Pieces, add_up, join_pieces
from moe_trace.show.figures.figure import TABLE_ROWS_MAX
from moe_trace.show.figures.timeline import timeline_figure
from moe_trace.show.tensorboard.parameters import Parameters, integer, time_window
from moe_trace.show.tensorboard.to_json import JsonDict, plain_figure, plain_table

KERNELS_MAX = 100
NAME_MAX = 400
PIXELS = 1500
"""Pieces closer than 1 / `PIXELS` of the window are joined."""


@dataclass(frozen=True)
class _Step:
    steps: list[int]
    step: int
    clock: Clock
    pieces: Pieces

    @property
    def bounds_ns(self) -> tuple[int, int]:
        return int(self.pieces.start_ns.min()), int(self.pieces.end_ns.max())


def timeline(lanes: Lanes, parameters: Parameters) -> JsonDict:
    """Return lanes and counters of the step, joined according to the window."""
    view = _step(lanes, parameters)
    if view is None:
        return {"steps": [], "figure": None}
    origin, end = view.bounds_ns
    window = time_window(parameters, origin, end)
    segments = join_pieces(view.pieces.within(*window), (window[1] - window[0]) // PIXELS)
    figure = timeline_figure(
        lanes, segments, step=view.step, clock=view.clock, origin_ns=origin, window_ns=window
    )
    return {
        "steps": view.steps,
        "step": view.step,
        "clock": view.clock,
        "clocks": list(lanes.clocks()),
        "length_us": (end - origin) / 1000,
        "figure": plain_figure(figure) if figure.data else None,
    }


def kernels(lanes: Lanes, parameters: Parameters) -> JsonDict:
    """Return the kernels, or operators of the host, that overlap the window, by name."""
    view = _step(lanes, parameters)
    if view is None:
        return {"table": None}
    pieces = view.pieces.within(*time_window(parameters, *view.bounds_ns))
    work = add_up(pieces, lanes)
    total = sum(w.total_us for w in work)
    rows = [
        (w.name[:NAME_MAX], w.phase, w.layers, w.count, w.total_us, w.total_us / w.count, w.total_us / total)
        for w in work[:KERNELS_MAX]
        if total
    ]
    noun = "kernel" if view.clock == "device" else "operator"
    headings = (noun, "part", "layers", "count", "total µs", "mean µs", "share")
    table = {**plain_table(headings, rows), "more": max(0, len(work) - min(KERNELS_MAX, TABLE_ROWS_MAX))}
    return {"table": table, "total_us": total, "count": len(pieces.block), "what": noun}


def _step(lanes: Lanes, parameters: Parameters) -> _Step | None:
    clock: Clock = "host" if parameters.get("clock") == "host" else lanes.clocks()[0]
    pieces: Pieces = lanes.device if clock == "device" else lanes.host
    steps = np.unique(lanes.samples.step[pieces.block]).tolist()
    if not steps:
        return None
    step = integer(parameters, "step", steps[0])
    step = step if step in steps else steps[0]
    return _Step(steps, step, clock, lanes.of_step(step, clock))
