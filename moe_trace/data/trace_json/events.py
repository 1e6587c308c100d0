"""Trace events needed to analyse routing, as columns of numpy arrays.

Three million events of a 1 GB trace take about 130 MB as columns; as objects they would take gigabytes.
The parser is msgspec with typed structs: it builds no Python object for fields that are not named here
(docs/reading.md has the measurement against orjson, simdjson, ijson and json).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import Span
from moe_trace.data.trace_json.comms import CommEvent, facts_of, is_comm
from moe_trace.data.trace_json.decoding import (
    NO_LINK,
    UNREADABLE,
    Event,
    Links,
    decode_batch,
    decode_one,
    recording_in,
    times_us,
)
from moe_trace.data.trace_json.stream import JsonStream


class Kind(IntEnum):
    """Kind of an event in the table."""

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


_KINDS = {
    "hpu_op": Kind.LAUNCH,
    "cpu_op": Kind.OP,
    "user_annotation": Kind.RANGE,
    "kernel": Kind.DEVICE,
    "concurrent_kernel": Kind.DEVICE,
    "gpu_memcpy": Kind.DEVICE,
    "gpu_memset": Kind.DEVICE,
    "mtia_ccp_events": Kind.DEVICE,
}
_HPU = "hpu_op"
"""Gaudi's bridge also uses this category for device work, without a link to its launch."""
_LAUNCHING = ("_runtime", "_driver")
_CATEGORIES_MAX = 1000
_FLOWS = {"s": Kind.FORWARD, "f": Kind.BACKWARD}


class _KindOf(dict[str | None, Kind | None]):
    """Mapping from category to kind; Kineto backends name host calls `<device>_runtime` and `_driver`."""

    def __missing__(self, category: str | None) -> Kind | None:
        kind = _KINDS.get(category or "")
        if kind is None and category is not None and category.endswith(_LAUNCHING):
            kind = Kind.LAUNCH
        if len(self) < _CATEGORIES_MAX:
            self[category] = kind
        return kind


@dataclass(frozen=True, eq=False)
class EventTable:
    """Event columns of equal length, in the order of the file."""

    kind: npt.NDArray[np.uint8]
    name: npt.NDArray[np.int32]
    """Index into `names`."""
    thread: npt.NDArray[np.int32]
    """Index into `threads`."""
    start_ns: npt.NDArray[np.int64]
    """On the trace's clock, as integers: microseconds since an epoch years ago exhaust a float's digits."""
    duration_ns: npt.NDArray[np.int64]
    link: npt.NDArray[np.int64]
    """Correlation or flow id; -1 if there is none."""
    names: tuple[str, ...]
    threads: tuple[tuple[Any, Any], ...]
    """(process, thread) ids as in the trace."""
    unreadable: int
    """Number of events that violate the trace format."""
    comms: tuple[CommEvent, ...] = ()
    """Events of collectives, in the order of the file; not among the rows of a selection."""
    processes: int = 1
    """Number of processes in the file; the table contains the events of one."""

    def __len__(self) -> int:
        return len(self.kind)

    def select(self, mask: npt.NDArray[Any]) -> EventTable:
        """Return the rows of a mask or an index."""
        chosen: Any = {name: getattr(self, name)[mask] for name in _COLUMNS}
        return replace(self, **chosen, comms=(), processes=1)

    @property
    def end_ns(self) -> npt.NDArray[np.int64]:
        """End times of the slices."""
        return self.start_ns + self.duration_ns


_COLUMNS = ("kind", "name", "thread", "start_ns", "duration_ns", "link")


def to_ns(time_us: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Convert microseconds to nanoseconds; exact, as Kineto writes nanoseconds with three decimals.

    NaN becomes 0; out-of-range times are clipped to what 64 bits hold.
    """
    finite_us = np.nan_to_num(
        np.asarray(time_us, np.float64), nan=0.0, posinf=_TIME_MAX_US, neginf=-_TIME_MAX_US
    )
    return np.rint(np.clip(finite_us, -_TIME_MAX_US, _TIME_MAX_US) * 1000).astype(np.int64)


def bounds_ns(span: Span) -> tuple[int, int]:
    """Return start and end in ns, each part rounded by itself: a float sum may be off by a nanosecond."""
    start, duration = to_ns([span.start_us, span.duration_us]).tolist()
    return start, start + duration


def spans_ns(spans: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return `bounds_ns` of `[N, 2]` starts and durations, [N, 2]."""
    ns = to_ns(spans)
    return np.stack([ns[:, 0], ns[:, 0] + ns[:, 1]], axis=1)


class EventTableBuilder:
    """Builds an `EventTable` from the batches of a stream."""

    def __init__(self) -> None:
        self._names: defaultdict[str, int] = defaultdict()
        self._names.default_factory = self._names.__len__
        self._threads: defaultdict[tuple[Any, Any], int] = defaultdict()
        self._threads.default_factory = self._threads.__len__
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._comms: list[CommEvent] = []
        self._is_comm: list[bool] = []  # for each name, whether it belongs to a collective
        self._kind_of = _KindOf()
        self._links = Links()
        self.recording: bytes | None = None
        """JSON of the recording that merging added, once read."""
        self.unreadable = 0
        self.seen = 0

    def read(self, stream: JsonStream) -> None:
        """Read `traceEvents` at the stream's position."""
        for batch in stream.batches(decode_batch, decode_one):
            self.add(batch)

    def add(self, events: list[Event]) -> None:
        """Add some events, keeping those of interest."""
        self.seen += len(events)
        self.recording = recording_in(events) or self.recording
        kind_of, link_of = self._kind_of, self._links.of
        slices = [e for e in events if e.ph == "X" and kind_of[e.cat] is not None]
        flows = [e for e in events if e.cat == "fwdbwd" and e.ph in _FLOWS]
        self.unreadable += sum(e is UNREADABLE for e in events)
        names, threads = self._names, self._threads
        kinds = [kind_of[e.cat] for e in slices] + [_FLOWS[e.ph] for e in flows]
        rows = slices + flows
        start_us = _array([e.ts for e in rows])
        duration_us = _array([e.dur for e in slices] + [0.0] * len(flows))
        plausible = (np.abs(start_us) < _TIME_MAX_US) & (duration_us >= 0) & (duration_us < _TIME_MAX_US)
        self.unreadable += int((~plausible).sum())
        links = [link_of(e.args.correlation if e.args is not None else None) for e in slices]
        if _HPU in kind_of:
            pairs = zip(slices, links, strict=True)
            work = [i for i, (e, link) in enumerate(pairs) if e.cat == _HPU and link == NO_LINK]
            for i in work:
                kinds[i] = Kind.DEVICE
        columns = (
            np.array(kinds, np.uint8),
            np.array([names[e.name] for e in rows], np.int32),
            np.array([threads[e.pid, e.tid] for e in rows], np.int32),
            to_ns(np.where(plausible, start_us, 0.0)),
            to_ns(np.where(plausible, duration_us, 0.0)),
            np.array([*links, *(link_of(e.id) for e in flows)], np.int64),
        )
        self._take_comms(slices, columns, plausible)
        self._parts.append(columns if plausible.all() else tuple(column[plausible] for column in columns))

    def _take_comms(
        self, slices: list[Event], columns: tuple[np.ndarray, ...], sound: npt.NDArray[np.bool_]
    ) -> None:
        """Keep events of collectives: few events, each with its arguments."""
        kind, name = columns[0][: len(slices)], columns[1][: len(slices)]
        self._is_comm += map(is_comm, itertools.islice(self._names, len(self._is_comm), None))
        host = (kind == Kind.OP) | (kind == Kind.RANGE)
        for i in np.flatnonzero(np.array(self._is_comm, bool)[name] & host & sound[: len(slices)]).tolist():
            event = slices[i]
            facts = facts_of(event.name, event.args)
            if facts is not None:
                thread, start, duration = (int(columns[c][i]) for c in (2, 3, 4))
                self._comms.append(CommEvent(event.name, thread, start, start + duration, facts))

    def build(self) -> EventTable:
        """Return the table of everything added, without events whose time is far from all others."""
        if not self._parts:
            self.add([])
        columns = map(np.concatenate, zip(*self._parts, strict=True))
        by_name: Any = dict(zip(_COLUMNS, columns, strict=True))
        table = EventTable(
            **by_name,
            names=tuple(self._names),
            threads=tuple(self._threads),
            unreadable=self.unreadable,
            comms=tuple(self._comms),
        )
        first, last = main_stretch(table.start_ns)
        inside = (table.start_ns >= first) & (table.start_ns <= last)
        if inside.all():
            return table
        return replace(
            table.select(inside),
            unreadable=self.unreadable + int((~inside).sum()),
            comms=tuple(c for c in self._comms if first <= c.start_ns <= last),
        )


def main_stretch(start_ns: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return the first and last start time of the recording.

    Invalid times (`ts: 0` among times since an epoch) lie outside it: those of fewer than one event in a
    hundred, an hour or more away from all others.
    """
    if not len(start_ns):
        return 0, 0
    first, last = int(start_ns.min()), int(start_ns.max())
    if last - first <= _MAX_GAP_NS:
        return first, last
    ordered = np.sort(start_ns)
    cuts = np.flatnonzero(np.diff(ordered) > _MAX_GAP_NS) + 1
    bounds = np.concatenate([[0], cuts, [len(ordered)]])
    largest = int(np.diff(bounds).argmax())
    low, high = int(bounds[largest]), int(bounds[largest + 1])
    if len(ordered) - (high - low) > max(1, _MAX_STRAY_SHARE * len(ordered)):
        return first, last
    return int(ordered[low]), int(ordered[high - 1])


def _array(times: list[float | str]) -> npt.NDArray[np.float64]:
    try:
        return np.array(times, np.float64)
    except ValueError:  # text that is not a number
        return np.array(times_us(times), np.float64)


# Beyond 126 years a start plus a duration in nanoseconds would not fit in 64 bits; NaN and infinity fail too.
_TIME_MAX_US = 4e15
_MAX_GAP_NS = 3600 * 10**9
_MAX_STRAY_SHARE = 0.01


def find_links(links: npt.NDArray[np.int64], among: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the first row with each link, [N], such as the launch of a kernel; -1 where there is none."""
    order = np.argsort(among, kind="stable")
    position = np.searchsorted(among, links, sorter=order)
    known = (position < len(among)) & (links != NO_LINK)
    known[known] = among[order[position[known]]] == links[known]
    row = np.full(len(links), -1, np.int64)
    row[known] = order[position[known]]
    return row
