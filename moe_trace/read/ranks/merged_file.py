"""Write the traces of several ranks as one, event by event, so that memory does not grow with their size."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np

from moe_trace.data.calls.placements import Places
from moe_trace.data.calls.table import CallTable
from moe_trace.data.codec import encode_recording
from moe_trace.data.errors import NothingRecorded
from moe_trace.data.files import whole_file
from moe_trace.data.lost_sums import add_lost
from moe_trace.data.schema import METADATA_KEY, Recording, RouterInfo
from moe_trace.data.trace_json.stream import JsonStream, value_or_none
from moe_trace.read.file.opening import Progress, open_trace_stream
from moe_trace.read.file.rank_parts import RANKS_KEY, MergedRanks, RankPart
from moe_trace.read.ranks.inputs import call_numbers
from moe_trace.read.ranks.merge_plan import MergePlan, RankTrace
from moe_trace.read.ranks.renumber import Event, Pids, Renamer
from moe_trace.timeline.additions import encode_addition
from moe_trace.timeline.counter_tracks import band_label

_OWN_KEYS = {"traceEvents", METADATA_KEY, "traceName", "baseTimeNanoseconds", "deviceProperties"}
_LEVEL = 6
_UNREADABLE: Event = {}


def write_merged(plan: MergePlan, out: Path, progress: Progress | None = None) -> MergedRanks:
    """Write the merged trace completely or not at all, plain or gzip according to its name.

    The same input gives the same bytes.

    Raises:
        NothingRecorded: No rank recorded a call.
        OutputError: The file cannot be written.
        TraceFileError: A trace changed since it was planned.
    """
    if not any(trace.recording.samples for trace in plan.ranks):
        raise NothingRecorded("none of the ranks recorded a router call; there is nothing to merge")
    with whole_file(out) as temporary, _open_output(temporary) as file:
        return _Writer(plan, file, progress).write(out.name)


@contextmanager
def _open_output(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        # Without name and time in the header, the same trace gives the same bytes.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0) as packed:
            yield cast(BinaryIO, packed)


class _Writer:
    """Writer of the merged trace, in one pass over the ranks' files."""

    def __init__(self, plan: MergePlan, file: BinaryIO, progress: Progress | None) -> None:
        self._plan = plan
        self._file = file
        self._progress = progress
        self._offset = 0
        self._first_event = True
        self._pids = Pids()
        self._after: dict[str, bytes] = {}
        self._unreadable: defaultdict[int, int] = defaultdict(int)
        self._label_us: float | None = None

    def write(self, name: str) -> MergedRanks:
        self._write_bytes(b"{\n")
        for key, value in self._merged_head(name).items():
            self._write_bytes(b"%b: %b,\n" % (json.dumps(key).encode(), value))
        self._write_bytes(b'"traceEvents": [')
        for place, trace in enumerate(self._plan.ranks):
            self._write_events(trace, place)
        merged = self._merged()
        recording = joined_recording(self._plan)
        label = band_label(recording.rank, self._label_us or 0.0)
        added = encode_recording(recording, **{RANKS_KEY: asdict(merged)})
        self._write_bytes(encode_addition(b"", label, added, offset=self._offset, first=self._first_event))
        self._write_bytes(b"\n]")
        for key, value in self._after.items():
            self._write_bytes(b",\n%b: %b" % (json.dumps(key).encode(), value))
        self._write_bytes(b"\n}\n")
        return merged

    def _write_bytes(self, data: bytes) -> None:
        self._file.write(data)
        self._offset += len(data)

    def _merged_head(self, name: str) -> dict[str, bytes]:
        """Return the first rank's top-level keys, with the devices of all ranks."""
        kept = {k: v for k, v in self._plan.ranks[0].head.items() if k not in _OWN_KEYS}
        devices: list[Any] = []
        for trace in self._plan.ranks:
            found = value_or_none(trace.head.get("deviceProperties", b"[]"))
            devices += [d for d in found if d not in devices] if isinstance(found, list) else []
        return {
            **kept,
            "deviceProperties": json.dumps(devices).encode(),
            "baseTimeNanoseconds": str(self._plan.base_time_ns).encode(),
            "traceName": json.dumps(name).encode(),
        }

    def _write_events(self, trace: RankTrace, place: int) -> None:
        renamer = Renamer(
            rank=trace.calls.rank,
            place=place,
            ranks=len(self._plan.ranks),
            shift_ns=self._plan.shift_ns(trace),
            pids=self._pids,
        )
        with open_trace_stream(trace.path, self._progress) as stream:
            seen = False
            for key in stream.walk():
                if key == "traceEvents":
                    seen = True
                    self._write_batches(stream, renamer)
                elif seen and place == 0 and key not in _OWN_KEYS and key not in trace.head:
                    self._after[key] = stream.value()
                else:
                    stream.skip()

    def _write_batches(self, stream: JsonStream, renamer: Renamer) -> None:
        for batch in stream.batches(_decode, _decode_one):
            renamed = [renamer.rename(event) for event in batch if event is not _UNREADABLE]
            lines = [_encode(event) for event in renamed if not self._takes_label(event)]
            self._unreadable[renamer.rank] += len(batch) - len(renamed)
            if lines:
                self._write_bytes((b"\n" if self._first_event else b",\n") + b",\n".join(lines))
                self._first_event = False

    def _takes_label(self, event: Event) -> bool:
        """Remove the event's recording; return whether the event with all ranks' recording replaces it."""
        arguments = event.get("args")
        if event.get("ph") != "M" or not isinstance(arguments, dict) or METADATA_KEY not in arguments:
            return False
        del arguments[METADATA_KEY]
        if self._label_us is not None:
            return False
        self._label_us = event.get("ts", 0.0)
        return True

    def _merged(self) -> MergedRanks:
        names = [router.name for router in joined_routers(self._plan)]
        return MergedRanks(
            parts=tuple(self._part(trace, names) for trace in self._plan.ranks),
            alignment=self._plan.alignment,
            missing=self._plan.missing,
            left_out=dict(self._plan.left_out),
            unreadable={rank: count for rank, count in self._unreadable.items() if count},
        )

    def _part(self, trace: RankTrace, names: list[str]) -> RankPart:
        held_experts = {router.name: router.held_experts for router in trace.recording.routers}
        return RankPart(
            rank=trace.calls.rank,
            file=trace.path.name,
            samples=len(trace.recording.samples),
            pids=self._pids.of_rank(trace.calls.rank),
            lost=trace.recording.lost,
            parallel=trace.recording.parallel,
            held=tuple(held_experts.get(name) for name in names),
            host_name=trace.calls.host_name,
            groups=trace.calls.groups,
            versions=trace.recording.versions,
        )


# -- events ----------------------------------------------------------------------------------------------

_decode = msgspec.json.Decoder(list[dict[str, Any]]).decode


def _decode_one(text: bytes) -> Event:
    value = value_or_none(text)
    return value if isinstance(value, dict) else _UNREADABLE


def _encode(event: Event) -> bytes:
    try:
        return msgspec.json.encode(event)
    except (UnicodeEncodeError, OverflowError, ValueError, RecursionError):  # only json can write such values
        return json.dumps(event).encode()


# -- the recording ---------------------------------------------------------------------------------------


def joined_routers(plan: MergePlan) -> list[RouterInfo]:
    """Return the routers of all ranks, without held experts, which are stored in the parts."""
    found: dict[str, RouterInfo] = {}
    for trace in plan.ranks:
        for router in trace.recording.routers:
            found.setdefault(router.name, replace(router, held_experts=None))
    return list(found.values())


def joined_recording(plan: MergePlan) -> Recording:
    """Concatenate the calls of all ranks on the common clock, with consecutive call numbers."""
    next_call: dict[str, int] = {}
    tables = []
    for trace in plan.ranks:
        calls = trace.recording.calls
        has_time = calls.host_start_ns != 0  # calls in compiled code that the host did not see have no time
        offset_ns = np.where(has_time, plan.alignment.offset_ns[trace.calls.rank], 0)
        moved = replace(calls, places=_shifted(calls.places, plan.shift_ns(trace)))
        tables.append(
            moved.with_numbers(
                call=call_numbers(trace.recording, next_call),
                host_start_ns=calls.host_start_ns + offset_ns,
                host_end_ns=calls.host_end_ns + offset_ns,
            )
        )
    samples = CallTable.concatenated(tables)
    return replace(
        plan.ranks[0].recording,
        routers=tuple(joined_routers(plan)),
        samples=samples,
        lost=add_lost([trace.recording.lost for trace in plan.ranks], set(samples.name.tolist())),
        parallel=None,
    )


def _shifted(places: Places, shift_ns: int) -> Places:
    if not shift_ns:
        return places
    spans = {}
    for key, span in places.spans.items():
        starts_us = [us if us != us else (round(us * 1000) + shift_ns) / 1000 for us in span[:, 0].tolist()]
        spans[key] = np.column_stack([starts_us, span[:, 1]])
    return replace(places, spans=spans)
