"""The events that questions about routing need, as columns of numpy arrays.

Three million events of a 1 GB trace take about 130 MB as columns; as objects they would take gigabytes.
The parser is msgspec with typed structs: it builds no Python object for the fields that are not named here
(docs/reading.md has the measurement against orjson, simdjson, ijson and json).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import Span
from moe_trace.read.file.comms import CommArgs, CommEvent, facts_of, is_comm
from moe_trace.read.file.stream import JsonStream, loads_lenient


class Kind(IntEnum):
    """What an event of the table is."""

    OP = 0
    """A torch operator on the host (`cpu_op`)."""
    RANGE = 1
    """A `record_function` range on the host (`user_annotation`)."""
    LAUNCH = 2
    """A call of the device's runtime or driver; `link` is its correlation."""
    DEVICE = 3
    """A kernel, copy or memset on a device; `link` is the correlation of its launch."""
    FORWARD = 4
    """The start of a forward-backward flow, at a forward operator; `link` is the flow's id."""
    BACKWARD = 5
    """The end of a forward-backward flow, at a backward node; `link` is the flow's id."""


_SLICES = {
    "cpu_op": Kind.OP,
    "user_annotation": Kind.RANGE,
    "kernel": Kind.DEVICE,
    "concurrent_kernel": Kind.DEVICE,
    "gpu_memcpy": Kind.DEVICE,
    "gpu_memset": Kind.DEVICE,
    "cuda_runtime": Kind.LAUNCH,
    "cuda_driver": Kind.LAUNCH,
    "xpu_runtime": Kind.LAUNCH,
    "xpu_driver": Kind.LAUNCH,
}
_FLOWS = {"s": Kind.FORWARD, "f": Kind.BACKWARD}


class _Args(CommArgs, gc=False):
    correlation: int | None = None


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str | None = None
    name: str = ""
    pid: int | str | None = None
    tid: int | str | None = None
    ts: float = 0.0
    dur: float = 0.0
    id: int | str | None = None
    args: _Args | None = None


_UNREADABLE = _Event(ph="unreadable")
_decode_batch = msgspec.json.Decoder(list[_Event]).decode
_decode_event = msgspec.json.Decoder(_Event).decode


def _decode_one(text: bytes) -> _Event:
    """An event of a batch that the fast way refuses, as far as it can be understood."""
    try:
        return _decode_event(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        value = loads_lenient(text)
    except (ValueError, OverflowError):
        return _UNREADABLE
    try:
        return _decode_event(msgspec.json.encode(value))  # the arguments stay JSON text
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError, TypeError):
        return _without_odd_fields(value)


def _without_odd_fields(value: Any) -> _Event:
    """Other tools put what they like into `id` and `args`; an event is only lost if its time is odd."""
    if not isinstance(value, dict):
        return _UNREADABLE
    kept = {key: value[key] for key in ("ph", "cat", "name", "pid", "tid", "ts", "dur") if key in value}
    try:
        return msgspec.convert(kept, _Event)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return _UNREADABLE


@dataclass(frozen=True)
class EventTable:
    """Columns of equal length, in the order of the file."""

    kind: npt.NDArray[np.uint8]
    name: npt.NDArray[np.int32]
    """Index into `names`."""
    thread: npt.NDArray[np.int32]
    """Index into `threads`."""
    start_ns: npt.NDArray[np.int64]
    """On the trace's clock. Integers, because microseconds since an epoch of years fill a float's digits."""
    duration_ns: npt.NDArray[np.int64]
    link: npt.NDArray[np.int64]
    """Correlation or flow id; -1 without."""
    names: tuple[str, ...]
    threads: tuple[tuple[Any, Any], ...]
    """(process, thread) ids as the trace has them."""
    unreadable: int
    """Events that are not as the trace format says."""
    comms: tuple[CommEvent, ...] = ()
    """What says something of collectives, in the order of the file; not among the rows of a selection."""

    def __len__(self) -> int:
        return len(self.kind)

    def select(self, mask: npt.NDArray[Any]) -> EventTable:
        """The rows of a mask or an index."""
        return EventTable(
            self.kind[mask],
            self.name[mask],
            self.thread[mask],
            self.start_ns[mask],
            self.duration_ns[mask],
            self.link[mask],
            self.names,
            self.threads,
            self.unreadable,
        )

    @property
    def end_ns(self) -> npt.NDArray[np.int64]:
        """Ends of the slices."""
        return self.start_ns + self.duration_ns


def to_ns(time_us: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Kineto writes whole nanoseconds as microseconds with three decimals; rounding gets them back.

    NaN becomes 0, and what no clock shows the nearest time that 64 bits hold.
    """
    sane = np.nan_to_num(np.asarray(time_us, np.float64), nan=0.0, posinf=_TIME_MAX_US, neginf=-_TIME_MAX_US)
    return np.rint(np.clip(sane, -_TIME_MAX_US, _TIME_MAX_US) * 1000).astype(np.int64)


def bounds_ns(span: Span) -> tuple[int, int]:
    """Start and end; each part is rounded on its own, for their sum as a float may be a nanosecond off."""
    start, duration = to_ns([span.start_us, span.duration_us]).tolist()
    return start, start + duration


def spans_ns(spans: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The same for `[N, 2]` starts and durations."""
    ns = to_ns(spans)
    return np.stack([ns[:, 0], ns[:, 0] + ns[:, 1]], axis=1)


class EventTableBuilder:
    """Takes the batches of a stream one after another."""

    def __init__(self) -> None:
        self._names: defaultdict[str, int] = defaultdict()
        self._names.default_factory = self._names.__len__
        self._threads: defaultdict[tuple[Any, Any], int] = defaultdict()
        self._threads.default_factory = self._threads.__len__
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._comms: list[CommEvent] = []
        self.unreadable = 0
        self.seen = 0

    def read(self, stream: JsonStream) -> None:
        """Take `traceEvents`, at which the stream stands."""
        for batch in stream.batches(_decode_batch, _decode_one):
            self.add(batch)

    def add(self, events: list[_Event]) -> None:
        """Take some events; keep those that the table is about."""
        self.seen += len(events)
        slices = [e for e in events if e.cat in _SLICES and e.ph == "X"]
        flows = [e for e in events if e.cat == "fwdbwd" and e.ph in _FLOWS]
        self.unreadable += sum(e is _UNREADABLE for e in events)
        names, threads = self._names, self._threads
        kinds = [_SLICES[e.cat] for e in slices] + [_FLOWS[e.ph] for e in flows]  # type: ignore[index]
        both = slices + flows
        start_us = np.array([e.ts for e in both], np.float64)
        duration_us = np.array([e.dur for e in both], np.float64)
        sound = (np.abs(start_us) < _TIME_MAX_US) & (duration_us >= 0) & (duration_us < _TIME_MAX_US)
        self.unreadable += int((~sound).sum())
        columns = (
            np.array(kinds, np.uint8),
            np.array([names[e.name] for e in both], np.int32),
            np.array([threads[e.pid, e.tid] for e in both], np.int32),
            to_ns(np.where(sound, start_us, 0.0)),
            to_ns(np.where(sound, duration_us, 0.0)),
            np.array([_correlation(e) for e in slices] + [_flow_id(e) for e in flows], np.int64),
        )
        self._take_comms(slices, columns, sound)
        self._parts.append(columns if sound.all() else tuple(column[sound] for column in columns))

    def _take_comms(
        self, slices: list[_Event], columns: tuple[np.ndarray, ...], sound: npt.NDArray[np.bool_]
    ) -> None:
        """Keep what tells of collectives: few events, each with its arguments."""
        for i, event in enumerate(slices):
            if is_comm(event.name) and sound[i] and columns[0][i] in (Kind.OP, Kind.RANGE):
                facts = facts_of(event.name, event.args)
                if facts is not None:
                    thread, start, duration = (int(columns[c][i]) for c in (2, 3, 4))
                    self._comms.append(CommEvent(event.name, thread, start, start + duration, facts))

    def build(self) -> EventTable:
        """The table of everything that was added."""
        if not self._parts:
            self.add([])
        kind, name, thread, start, duration, link = (
            np.concatenate([part[i] for part in self._parts]) for i in range(6)
        )
        return EventTable(
            kind,
            name,
            thread,
            start,
            duration,
            link,
            tuple(self._names),
            tuple(self._threads),
            self.unreadable,
            tuple(self._comms),
        )


# Beyond 126 years a start plus a duration in nanoseconds would not fit in 64 bits; NaN and infinity fail too.
_TIME_MAX_US = 4e15
_INT64 = range(-(2**63), 2**63)


def _correlation(event: _Event) -> int:
    value = event.args.correlation if event.args is not None else None
    return value if value is not None and value in _INT64 else -1


def _flow_id(event: _Event) -> int:
    value = event.id
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < 19 else -1
    return value if value is not None and value in _INT64 else -1
