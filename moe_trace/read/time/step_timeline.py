"""One step of a trace: its pieces of work (layer, phase, clock, name), and the counters beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.schema import RoutingSample, Span
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.kernels import Kernels, find_kernels
from moe_trace.read.time.blocks import find_blocks
from moe_trace.read.time.compiled import forward_phases
from moe_trace.read.time.phase_detection import PHASES, Steps, find_steps
from moe_trace.timeline.correlate.compiled_calls import CompiledCalls, join_compiled
from moe_trace.timeline.placed_calls import FIGURES, PlacedCalls

IntArray = npt.NDArray[np.int64]
Clock = Literal["device", "host"]
SEGMENTS_MAX = 4000
COUNTED_MAX = 1500

CounterTrack = tuple[str, list[tuple[Span, float]]]
"""A figure's name, and for each call the interval of its MoE block with the figure's value."""


@dataclass(frozen=True)
class Pieces:
    """N kernels (device) or outermost operators (host) inside MoE blocks, by start. [N] arrays."""

    block: IntArray
    """Index of the call in `Lanes.samples`."""
    phase: IntArray
    start_ns: IntArray
    end_ns: IntArray
    name: IntArray
    """Index into `Lanes.names`."""

    def select(self, mask: npt.NDArray) -> Pieces:
        """The pieces of a mask or an index."""
        return Pieces(
            self.block[mask], self.phase[mask], self.start_ns[mask], self.end_ns[mask], self.name[mask]
        )

    def within(self, start_ns: int, end_ns: int) -> Pieces:
        """Those that touch an interval."""
        return self.select((self.end_ns >= start_ns) & (self.start_ns <= end_ns))


@dataclass(frozen=True)
class Lanes:
    """The forward work of all MoE calls that have ranges in the trace."""

    samples: CallTable
    device: Pieces
    """Empty where the trace has no kernels."""
    host: Pieces
    names: tuple[str, ...]

    def clocks(self) -> tuple[Clock, ...]:
        """The device first, where it has any work."""
        return ("device", "host") if len(self.device.block) else ("host",)

    def of_step(self, step: int, clock: Clock) -> Pieces:
        """The pieces of one profiler step."""
        mine = self.samples.step == step
        pieces = self.device if clock == "device" else self.host
        return pieces.select(mine[pieces.block]) if len(mine) else pieces


@dataclass(frozen=True)
class Segments:
    """S stretches of one phase of one call, whose pieces follow each other closely. [S] arrays."""

    block: IntArray
    phase: IntArray
    start_ns: IntArray
    end_ns: IntArray
    pieces: IntArray
    """How many pieces each is made of."""
    joined_ns: int
    """Pieces closer than this were drawn together."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """All pieces of one name in one phase."""

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
        graphs: what the compiler noted of the calls inside compiled code.
    """
    blocks, kernels, calls = find_blocks(samples, events), find_kernels(events), CallTable.of(samples)
    steps = find_steps(events, blocks)
    device, host = _device_pieces(kernels, steps), _host_pieces(events, steps)
    join = join_compiled(calls, graphs, events, kernels)
    if join is None:
        return Lanes(samples=blocks.samples, device=device, host=host, names=events.names)
    timed, compiled = _compiled_pieces(join, len(blocks.samples))
    return Lanes(
        samples=CallTable.concatenated([blocks.samples, calls.take(timed)]),
        device=_together(device, compiled) if join.on_device else device,
        host=host if join.on_device else _together(host, compiled),
        names=events.names,
    )


def _compiled_pieces(join: CompiledCalls, first: int) -> tuple[IntArray, Pieces]:
    """The rows of calls inside compiled code whose kernels are known, and these; calls count from `first`."""
    work, phase = forward_phases(join)
    kernel = np.array([one.kernel for one in work], np.int64)
    timed, block = np.unique(np.array([one.call for one in work], np.int64), return_inverse=True)
    start = join.kernels.start_ns[kernel]
    end, name = start + join.kernels.duration_ns[kernel], join.kernels.name[kernel].astype(np.int64)
    return timed, Pieces(first + block, phase, start, end, name)


def _together(one: Pieces, other: Pieces) -> Pieces:
    names = Pieces.__dataclass_fields__
    both = Pieces(**{name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in names})
    return both.select(np.argsort(both.start_ns, kind="stable"))


def _device_pieces(kernels: Kernels, steps: Steps) -> Pieces:
    launched = steps.at(kernels.launch_thread, kernels.launch_ns)
    known = np.flatnonzero(launched >= 0)
    known = known[np.argsort(kernels.start_ns[known], kind="stable")]
    step, start = launched[known], kernels.start_ns[known]
    name = kernels.name[known].astype(np.int64)
    return Pieces(steps.block[step], steps.phase[step], start, start + kernels.duration_ns[known], name)


def _host_pieces(events: EventTable, steps: Steps) -> Pieces:
    order = np.argsort(steps.start_ns, kind="stable")
    thread, start = steps.thread[order], steps.start_ns[order]
    return Pieces(
        steps.block[order], steps.phase[order], start, steps.end_ns[order], _names_at(events, thread, start)
    )


def _names_at(events: EventTable, thread: IntArray, start_ns: IntArray) -> IntArray:
    """Names of the longest operator or launch that starts there."""
    host = events.select((events.kind == Kind.OP) | (events.kind == Kind.LAUNCH))
    host = host.select(np.lexsort((-host.duration_ns, host.start_ns, host.thread)))
    if not len(host):
        return np.zeros(0, dtype=np.int64)
    origin = int(host.start_ns.min())
    stride = int(host.start_ns.max()) - origin + 1
    keys = host.start_ns - origin + host.thread.astype(np.int64) * stride
    return host.name[np.searchsorted(keys, start_ns - origin + thread * stride)].astype(np.int64)


def join_pieces(pieces: Pieces, closer_than_ns: int) -> Segments:
    """Take neighbours of one call and phase together; wider, if there are more than `SEGMENTS_MAX`."""
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
    # One running maximum for all groups: each is moved behind all before it.
    rank = np.cumsum(np.concatenate([[0], group[1:] != group[:-1]]))
    stride = int(end.max() - start.min()) + closer_than_ns + 1
    moved = rank * stride - int(start.min())
    reach = np.maximum.accumulate(end + moved)
    first = np.concatenate([[True], (start + moved)[1:] > reach[:-1] + closer_than_ns])
    first[1:] |= group[1:] != group[:-1]
    begins = np.flatnonzero(first)
    ends = np.concatenate([begins[1:], [len(group)]])
    return Segments(
        block=group[begins] // len(PHASES),
        phase=group[begins] % len(PHASES),
        start_ns=start[begins],
        end_ns=(reach - moved)[ends - 1],
        pieces=ends - begins,
        joined_ns=closer_than_ns,
    )


def add_up(pieces: Pieces, lanes: Lanes) -> list[Work]:
    """Time by name and phase, the longest first."""
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
    """The figures of the trace's counters that are not 0 throughout, over the calls that touch the window."""
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
