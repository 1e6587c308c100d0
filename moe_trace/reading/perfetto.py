"""A native Perfetto trace: MoE tracks under one parent, counters with units, ranges as slices.

Chrome's JSON can say neither units nor nested tracks. Times are the trace's own, in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.errors import UsageError
from moe_trace.files import whole_file
from moe_trace.reading.events import to_ns
from moe_trace.schema import BAND_NAME, RangeKind, RoutingSample
from moe_trace.timeline.band import FIGURES, PlacedCall, numbered, placed_call, slice_args, without_overlap

_SEQUENCE = 1
_UNITS = {
    "load max÷mean": ("×", None),
    "router entropy (nats)": ("nats", None),
    "active experts": ("experts", "UNIT_COUNT"),
    "expert TFLOP/s": ("TFLOP/s", None),
    "skipped slots (%)": ("%", None),
    "tokens": ("tokens", "UNIT_COUNT"),
    "memory": (None, "UNIT_SIZE_BYTES"),
}
_FIGURES: dict[str, Callable[[PlacedCall], float | None]] = {
    **FIGURES,
    "tokens": lambda call: call.sample.tokens,
    "memory": lambda call: call.sample.memory_allocated_bytes,
}
LANES: tuple[RangeKind, ...] = ("block", "router", "experts")


def write_perfetto(samples: Sequence[RoutingSample], target: Path, *, rank: int = 0) -> None:
    """Write the calls that have their place in the trace.

    Raises:
        UsageError: the perfetto package is not installed, or no call has a place.
    """
    calls = sorted(
        (placed_call(s) for s in samples if s.placement is not None), key=lambda call: call.moe.start_us
    )
    if not calls:
        raise UsageError("no call has its ranges in the trace, so there is nothing to put on a timeline")
    try:
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder
    except ImportError as error:
        raise UsageError(
            "a Perfetto trace needs the perfetto package; run: pip install 'moe_trace[export]'"
        ) from error
    with whole_file(target) as temporary, temporary.open("wb") as file:
        writer = _Writer(StreamingTraceProtoBuilder(file))
        parent = writer.track(f"{BAND_NAME} (rank {rank})")
        for kind in LANES:
            _write_lanes(writer, parent, kind, [call for call in calls if kind in call.spans])
        for name, figure in _FIGURES.items():
            _write_counter(writer, parent, name, figure, calls)


@dataclass
class _Writer:
    builder: Any
    tracks: int = 0

    def track(
        self, name: str, parent: int | None = None, unit: tuple[str | None, str | None] | None = None
    ) -> int:
        """Describe a track; returns its id."""
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

    def event(self, track: int, time_us: float) -> Any:
        """A packet with an event of a track, to be filled and written."""
        packet = self._packet()
        packet.timestamp = int(to_ns(time_us))
        packet.track_event.track_uuid = track
        return packet

    def write(self, packet: Any) -> None:
        """Write a packet."""
        self.builder.write_packet(packet)

    def _packet(self) -> Any:
        packet = self.builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        return packet


def _write_lanes(writer: _Writer, parent: int, kind: RangeKind, calls: Sequence[PlacedCall]) -> None:
    for lane, members in enumerate(without_overlap(calls, lambda call: call.spans[kind])):
        track = writer.track(numbered(kind, lane), parent)
        for call in members:
            span = call.spans[kind]
            begin = writer.event(track, span.start_us)
            begin.track_event.type = begin.track_event.TYPE_SLICE_BEGIN
            begin.track_event.name = call.sample.site
            begin.track_event.categories.append("moe_trace")
            for name, value in slice_args(call).items():
                _annotate(begin.track_event.debug_annotations.add(), name, value)
            writer.write(begin)
            end = writer.event(track, span.end_us)
            end.track_event.type = end.track_event.TYPE_SLICE_END
            writer.write(end)


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


def _write_counter(
    writer: _Writer,
    parent: int,
    name: str,
    figure: Callable[[PlacedCall], float | None],
    calls: Sequence[PlacedCall],
) -> None:
    """A step function: each layer's value over its MoE block, 0 from its end."""
    known = [(call, value) for call in calls if (value := figure(call)) is not None]
    values = {id(call): value for call, value in known}
    for lane, members in enumerate(without_overlap([call for call, _ in known], lambda call: call.moe)):
        track = writer.track(numbered(name, lane), parent, _UNITS[name])
        for call in members:
            for time_us, value in ((call.moe.start_us, values[id(call)]), (call.moe.end_us, 0.0)):
                packet = writer.event(track, time_us)
                packet.track_event.type = packet.track_event.TYPE_COUNTER
                packet.track_event.double_counter_value = float(value)
                writer.write(packet)
