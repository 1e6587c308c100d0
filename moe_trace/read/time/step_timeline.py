"""Pieces of work of one step of a trace (layer, phase, clock, name), with its counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.schema import RoutingSample, Span
from moe_trace.data.trace_json.events import EventTable
from moe_trace.data.trace_json.intervals import reached_by_group
from moe_trace.data.trace_json.kernels import Kernels, find_kernels
from moe_trace.read.time.blocks import find_blocks
from moe_trace.read.time.columns import Columns
from moe_trace.read.time.compiled import phased_kernels
from moe_trace.read.time.phase_detection import PHASES, Steps, find_steps
from moe_trace.timeline.correlate.compiled_calls import CompiledCalls, join_compiled
from moe_trace.timeline.placed_calls import FIGURES, PlacedCalls

IntArray = npt.NDArray[np.int64]
Clock = Literal["device", "host"]
SEGMENTS_MAX = 4000
COUNTED_MAX = 1500

CounterTrack = tuple[str, list[tuple[Span, float]]]
"""Name of a metric, and for each call the interval of its MoE block with the metric's value."""


@dataclass(frozen=True)
class Pieces(Columns):
    """N kernels (device) or outermost operators (host) inside MoE blocks, sorted by start. Arrays are [N]."""

    block: IntArray
    """Row of the call in `Lanes.samples`."""
    phase: IntArray
    start_ns: IntArray
    end_ns: IntArray
    name: IntArray
    """Index into `Lanes.names`."""

    def by_start(self) -> Pieces:
        """Sort by start."""
        return self.select(np.argsort(self.start_ns, kind="stable"))

    def within(self, start_ns: int, end_ns: int) -> Pieces:
        """Select the pieces that touch an interval."""
        return self.select((self.end_ns >= start_ns) & (self.start_ns <= end_ns))


@dataclass(frozen=True)
class Lanes:
    """Forward work of all MoE calls that have ranges in the trace."""

    samples: CallTable
    device: Pieces
    """Empty if the trace has no kernels."""
    host: Pieces
    names: tuple[str, ...]

    def clocks(self) -> tuple[Clock, ...]:
        """Return the clocks with work, with the device first if it has any."""
        return ("device", "host") if len(self.device.block) else ("host",)

    def of_step(self, step: int, clock: Clock) -> Pieces:
        """Return the pieces of one profiler step."""
        in_step = self.samples.step == step
        pieces = self.device if clock == "device" else self.host
        return pieces.select(in_step[pieces.block]) if len(in_step) else pieces


@dataclass(frozen=True)
class Segments:
    """S stretches of one phase of one call, whose pieces are close to each other. Arrays are [S]."""

    block: IntArray
    phase: IntArray
    start_ns: IntArray
    end_ns: IntArray
    pieces: IntArray
    """Number of pieces in each stretch."""
    joined_ns: int
    """Maximum gap between joined pieces, in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Total of all pieces with one name in one phase."""

    name: str
    phase: str
    count: int
    total_us: float
    layers: int


def find_lanes(
    samples: Sequence[RoutingSample], events: EventTable, graphs: Sequence[CompiledGraph] = ()
) -> Lanes:
    """Join kernels and operators with the MoE calls that they belong to.

    Args:
        graphs: Notes of the compiler on the calls inside compiled code.
    """
    blocks, kernels, calls = find_blocks(samples, events), find_kernels(events), CallTable.of(samples)
    steps = find_steps(events, blocks)
    device = _device_pieces(kernels, steps)
    host = Pieces(steps.block, steps.phase, steps.start_ns, steps.end_ns, steps.name.astype(np.int64))
    host = host.by_start()
    join = join_compiled(calls, graphs, events, kernels)
    if join is None:
        return Lanes(samples=blocks.samples, device=device, host=host, names=events.names)
    timed, compiled = _compiled_pieces(join, len(blocks.samples))
    return Lanes(
        samples=CallTable.concatenated([blocks.samples, calls.take(timed)]),
        device=Pieces.concatenated([device, compiled]).by_start() if join.on_device else device,
        host=host if join.on_device else Pieces.concatenated([host, compiled]).by_start(),
        names=events.names,
    )


def _compiled_pieces(join: CompiledCalls, first: int) -> tuple[IntArray, Pieces]:
    """Return the rows of compiled calls with known kernels, and these kernels; calls count from `first`."""
    work, kernels = phased_kernels(join.forward()), join.kernels
    timed, block = np.unique(work.call, return_inverse=True)
    start, name = kernels.start_ns[work.kernel], kernels.name[work.kernel].astype(np.int64)
    end = start + kernels.duration_ns[work.kernel]
    return timed, Pieces(first + block, work.phase, start, end, name)


def _device_pieces(kernels: Kernels, steps: Steps) -> Pieces:
    launched = steps.at(kernels.launch_thread, kernels.launch_ns)
    step, start = launched[launched >= 0], kernels.start_ns[launched >= 0]
    end = start + kernels.duration_ns[launched >= 0]
    name = kernels.name[launched >= 0].astype(np.int64)
    return Pieces(steps.block[step], steps.phase[step], start, end, name).by_start()


def join_pieces(pieces: Pieces, closer_than_ns: int) -> Segments:
    """Join neighbours of one call and phase, with wider gaps if there are more than `SEGMENTS_MAX`."""
    while True:
        found = _joined(pieces, closer_than_ns)
        if len(found.block) <= SEGMENTS_MAX:
            return found
        closer_than_ns = max(1, 2 * closer_than_ns)


def _joined(pieces: Pieces, closer_than_ns: int) -> Segments:
    group = pieces.block * len(PHASES) + pieces.phase
    order = np.lexsort((pieces.start_ns, group))
    group, start, end = group[order], pieces.start_ns[order], pieces.end_ns[order]
    if not len(group):
        none = np.zeros(0, dtype=np.int64)
        return Segments(none, none, none, none, none, closer_than_ns)
    starts, ends = reached_by_group(group, start, end)
    is_separate = (starts[1:] > ends[:-1] + closer_than_ns) | (group[1:] != group[:-1])
    begins = np.flatnonzero(np.concatenate([[True], is_separate]))
    return Segments(
        block=group[begins] // len(PHASES),
        phase=group[begins] % len(PHASES),
        start_ns=start[begins],
        end_ns=np.maximum.reduceat(end, begins),
        pieces=np.diff(begins, append=len(group)),
        joined_ns=closer_than_ns,
    )


def add_up(pieces: Pieces, lanes: Lanes) -> list[Work]:
    """Sum time by name and phase, the longest first."""
    if not len(pieces.block):
        return []
    layer = lanes.samples.layer[pieces.block]
    keys, inverse = np.unique(pieces.name * len(PHASES) + pieces.phase, return_inverse=True)
    total = np.bincount(inverse, weights=(pieces.end_ns - pieces.start_ns).astype(np.float64))
    count = np.bincount(inverse)
    found = [
        Work(
            name=lanes.names[int(key) // len(PHASES)],
            phase=PHASES[int(key) % len(PHASES)],
            count=int(count[i]),
            total_us=float(total[i]) / 1000,
            layers=len(np.unique(layer[inverse == i])),
        )
        for i, key in enumerate(keys)
    ]
    return sorted(found, key=lambda work: -work.total_us)


def counter_tracks(
    samples: Sequence[RoutingSample], clock: Clock, window_ns: tuple[int, int]
) -> list[CounterTrack]:
    """Return the trace's counters that are not 0 throughout, over the calls that touch the window."""
    calls = CallTable.of(samples)
    calls = calls.take(~np.isnan(calls.duration_us(clock, "router")))
    placed = PlacedCalls.on(np.full(len(calls), clock == "device"), calls)
    low, high = window_ns[0] / 1000, window_ns[1] / 1000
    rows = np.flatnonzero((placed.moe.sum(1) >= low) & (placed.moe[:, 0] <= high))
    rows = rows[:: max(1, -(-len(rows) // COUNTED_MAX))]
    tracks = []
    for name, figure in FIGURES.items():
        values = figure(placed)[rows]
        known = values == values
        if values[known].any():
            spans = [Span(*span) for span in placed.moe[rows[known]].tolist()]
            tracks.append((name, list(zip(spans, map(float, values[known]), strict=True))))
    return tracks
