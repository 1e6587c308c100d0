"""Write a native Perfetto trace: MoE tracks under one parent, counters with units, ranges as slices.

Chrome's JSON format supports neither units nor nested tracks. Times are those of the trace, in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.placements import Floats
from moe_trace.data.calls.table import CallTable
from moe_trace.data.errors import UsageError, optional_package
from moe_trace.data.files import whole_file
from moe_trace.data.schema import BAND_NAME, RangeKind, RoutingSample
from moe_trace.data.trace_json.events import to_ns
from moe_trace.timeline.counter_tracks import numbered, without_overlap
from moe_trace.timeline.placed_calls import FIGURES, REPLAY_FIGURES, REPLAY_NAME, PlacedCalls

_SEQUENCE_ID = 1
_UNITS = {
    "load max÷mean": ("×", None),
    "router entropy (nats)": ("nats", None),
    "active experts": ("experts", "UNIT_COUNT"),
    "expert TFLOP/s (with gaps)": ("TFLOP/s", None),
    "skipped slots (%)": ("%", None),
    "tokens": ("tokens", "UNIT_COUNT"),
    "memory": (None, "UNIT_SIZE_BYTES"),
    "load max÷mean (graph: worst layer)": ("×", None),
    "load max÷mean (graph: mean)": ("×", None),
    "router entropy (nats) (graph: mean)": ("nats", None),
    "active experts (graph: mean)": ("experts", "UNIT_COUNT"),
}
_FIGURES: dict[str, Callable[[PlacedCalls], npt.NDArray]] = {
    **FIGURES,
    "tokens": lambda placed: placed.calls.tokens,
    "memory": lambda placed: np.array(placed.calls.values("memory_allocated_bytes"), np.float64),
}
LANES: tuple[RangeKind, ...] = ("block", "router", "experts")


def write_perfetto(
    samples: Sequence[RoutingSample], target: Path, *, rank: int = 0, experts_are_split: bool = False
) -> None:
    """Write the calls that have a placement in the trace.

    Args:
        experts_are_split: See `Recording.experts_are_split`; their FLOP/s are then left out.

    Raises:
        MissingPackage: The perfetto package is not installed.
        UsageError: No call has a placement.
    """
    placed = PlacedCalls.of(CallTable.of(samples), experts_are_split=experts_are_split)
    if not len(placed):
        raise UsageError("no call has its ranges in the trace, so there is nothing to put on a timeline")
    builder = optional_package(
        "perfetto.trace_builder.proto_builder", "a Perfetto trace", "'moe_trace[export]'"
    )
    with whole_file(target) as temporary, temporary.open("wb") as file:
        writer = _Writer(builder.StreamingTraceProtoBuilder(file))
        _write_calls(writer, writer.track(f"{BAND_NAME} (rank {rank})"), placed)


def _write_calls(writer: _Writer, parent: int, placed: PlacedCalls) -> None:
    counts = placed.calls.assignments.to_lists()  # all experts, since this file contains no recording
    arguments = [args | {"assignments": own} for args, own in zip(placed.slice_args(), counts, strict=True)]
    slices = list(zip(placed.calls.site.tolist(), arguments, strict=True))
    for kind in LANES:
        rows = placed.having(kind)
        _write_lanes(writer, parent, kind, placed.spans[kind][rows], [slices[row] for row in rows.tolist()])
    layers = placed.of_layers
    for name, figure in _FIGURES.items():
        _write_counter(writer, parent, name, placed.moe[layers], figure(placed)[layers])
    replays = placed.replays
    graphs = [(REPLAY_NAME, args) for args in replays.slice_args()]
    _write_lanes(writer, parent, REPLAY_NAME, replays.spans, graphs)
    for name, of_replays in REPLAY_FIGURES.items():
        _write_counter(writer, parent, name, replays.spans, of_replays(replays))


@dataclass
class _Writer:
    builder: Any
    tracks: int = 0

    def track(
        self, name: str, parent: int | None = None, unit: tuple[str | None, str | None] | None = None
    ) -> int:
        """Describe a track and return its id."""
        self.tracks += 1
        packet = self._packet()
        descriptor = packet.track_descriptor
        descriptor.uuid = self.tracks
        descriptor.name = name
        descriptor.sibling_order_rank = self.tracks
        if parent is None:
            descriptor.child_ordering = descriptor.EXPLICIT
        else:
            descriptor.parent_uuid = parent
        if unit is not None:
            unit_name, unit_kind = unit
            descriptor.counter.SetInParent()
            if unit_name is not None:
                descriptor.counter.unit_name = unit_name
            if unit_kind is not None:
                descriptor.counter.unit = descriptor.counter.Unit.Value(unit_kind)
        self.builder.write_packet(packet)
        return self.tracks

    @contextmanager
    def event(self, track: int, time_us: float, kind: str) -> Iterator[Any]:
        """Create an event of a track, which is written after the caller has filled it."""
        packet = self._packet()
        packet.timestamp = int(to_ns(time_us))
        packet.track_event.track_uuid = track
        packet.track_event.type = getattr(packet.track_event, f"TYPE_{kind}")
        yield packet.track_event
        self.builder.write_packet(packet)

    def _packet(self) -> Any:
        packet = self.builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE_ID
        return packet


def _write_lanes(
    writer: _Writer, parent: int, name: str, spans: Floats, slices: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Write slices, given by title and arguments, at `[N, 2]` starts and durations."""
    for lane, members in enumerate(without_overlap(spans)):
        track = writer.track(numbered(name, lane), parent)
        for row, (start_us, duration_us) in zip(members.tolist(), spans[members].tolist(), strict=True):
            title, arguments = slices[row]
            with writer.event(track, start_us, "SLICE_BEGIN") as begin:
                begin.name = title
                begin.categories.append("moe_trace")
                for key, value in arguments.items():
                    _annotate(begin.debug_annotations.add(), key, value)
            with writer.event(track, start_us + duration_us, "SLICE_END"):
                pass


def _annotate(annotation: Any, name: str, value: Any) -> None:
    annotation.name = name
    if isinstance(value, bool):
        annotation.bool_value = value
    elif isinstance(value, int):
        annotation.int_value = value
    elif isinstance(value, float):
        annotation.double_value = value
    elif isinstance(value, (list, np.ndarray)):
        for item in value:
            annotation.array_values.add().int_value = int(item)
    elif value is not None:
        annotation.string_value = str(value)


def _write_counter(writer: _Writer, parent: int, name: str, spans: Floats, values: npt.NDArray) -> None:
    """Write a step function: a layer's value over its MoE block, or a graph's over its replay, and then 0."""
    for lane, members in enumerate(without_overlap(spans, np.flatnonzero(values == values))):
        track = writer.track(numbered(name, lane), parent, _UNITS[name])
        pairs = zip(spans[members].tolist(), values[members].tolist(), strict=True)
        for (start_us, duration_us), value in pairs:
            for time_us, level in ((start_us, value), (start_us + duration_us, 0.0)):
                with writer.event(track, time_us, "COUNTER") as counter:
                    counter.double_counter_value = float(level)
