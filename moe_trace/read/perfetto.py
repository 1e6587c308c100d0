"""A native Perfetto trace: MoE tracks under one parent, counters with units, ranges as slices.

Chrome's JSON can say neither units nor nested tracks. Times are the trace's own, in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.errors import UsageError, optional_package
from moe_trace.data.files import whole_file
from moe_trace.data.schema import BAND_NAME, RangeKind, RoutingSample, Span
from moe_trace.read.file.events import to_ns
from moe_trace.timeline.counter_tracks import FIGURES, numbered, slice_args, without_overlap
from moe_trace.timeline.replay_slices import (
    REPLAY_FIGURES,
    REPLAY_NAME,
    PlacedCall,
    find_replays,
    placed_call,
    replay_args,
)

_SEQUENCE = 1
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
_FIGURES: dict[str, Callable[[PlacedCall], float | None]] = {
    **FIGURES,
    "tokens": lambda call: call.sample.tokens,
    "memory": lambda call: call.sample.memory_allocated_bytes,
}
LANES: tuple[RangeKind, ...] = ("block", "router", "experts")


def write_perfetto(
    samples: Sequence[RoutingSample], target: Path, *, rank: int = 0, experts_are_split: bool = False
) -> None:
    """Write the calls that have their place in the trace.

    Args:
        experts_are_split: see `Recording.experts_are_split`; their FLOP/s are left out then.

    Raises:
        MissingPackage: the perfetto package is not installed.
        UsageError: no call has a place.
    """
    calls = sorted(
        (placed_call(s, experts_are_split=experts_are_split) for s in samples if s.placement is not None),
        key=lambda call: call.moe.start_us,
    )
    if not calls:
        raise UsageError("no call has its ranges in the trace, so there is nothing to put on a timeline")
    builder = optional_package(
        "perfetto.trace_builder.proto_builder", "a Perfetto trace", "'moe_trace[export]'"
    )
    with whole_file(target) as temporary, temporary.open("wb") as file:
        writer = _Writer(builder.StreamingTraceProtoBuilder(file))
        parent = writer.track(f"{BAND_NAME} (rank {rank})")
        for kind in LANES:
            _write_lanes(writer, parent, kind, _slices(kind, calls))
        for name, figure in _FIGURES.items():
            _write_counter(
                writer, parent, name, [(call.moe, figure(call)) for call in calls if call.of_layer]
            )
        replays = find_replays(calls)
        _write_lanes(writer, parent, REPLAY_NAME, [(r.span, REPLAY_NAME, replay_args(r)) for r in replays])
        for name, replay_figure in REPLAY_FIGURES.items():
            _write_counter(writer, parent, name, [(r.span, replay_figure(r)) for r in replays])


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


_Slice = tuple[Span, str, dict[str, Any]]
"""Where it stands, its name, and what a click on it shows."""


def _slices(kind: RangeKind, calls: Sequence[PlacedCall]) -> list[_Slice]:
    with_span = [call for call in calls if kind in call.spans]
    return [(call.spans[kind], call.sample.site, _arguments(call)) for call in with_span]


def _arguments(call: PlacedCall) -> dict[str, Any]:
    """With all experts: this file holds no recording that would have them."""
    return {**slice_args(call), "assignments": call.sample.assignments.tolist()}


def _write_lanes(writer: _Writer, parent: int, name: str, slices: Sequence[_Slice]) -> None:
    for lane, members in enumerate(without_overlap(slices, lambda one: one[0])):
        track = writer.track(numbered(name, lane), parent)
        for span, title, arguments in members:
            begin = writer.event(track, span.start_us)
            begin.track_event.type = begin.track_event.TYPE_SLICE_BEGIN
            begin.track_event.name = title
            begin.track_event.categories.append("moe_trace")
            for key, value in arguments.items():
                _annotate(begin.track_event.debug_annotations.add(), key, value)
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
    writer: _Writer, parent: int, name: str, values: Sequence[tuple[Span, float | None]]
) -> None:
    """A step function: a layer's value over its MoE block, a graph's over its replay, 0 from its end."""
    known = [(span, value) for span, value in values if value is not None]
    for lane, members in enumerate(without_overlap(known, lambda item: item[0])):
        track = writer.track(numbered(name, lane), parent, _UNITS[name])
        for span, value in members:
            for time_us, level in ((span.start_us, value), (span.end_us, 0.0)):
                packet = writer.event(track, time_us)
                packet.track_event.type = packet.track_event.TYPE_COUNTER
                packet.track_event.double_counter_value = float(level)
                writer.write(packet)
