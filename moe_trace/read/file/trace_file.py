"""Read plain or gzip-compressed traces: the recording, the events, and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from moe_trace.data.codec import SAMPLES_KEY, decode_recording
from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import METADATA_KEY, Recording
from moe_trace.data.trace_json.events import EventTable, EventTableBuilder
from moe_trace.data.trace_json.head import KEYS, base_time, device_names, group_ranks, host_name
from moe_trace.data.trace_json.stream import JsonStream, loads_lenient
from moe_trace.read.file.folder import NO_EVENTS, REDUCED_SUFFIX
from moe_trace.read.file.opening import Progress, open_trace_stream, opened
from moe_trace.read.file.processes import events_of_recording
from moe_trace.read.file.rank_parts import MergedRanks, decode_merged, events_of, rank_recordings
from moe_trace.read.file.worker_names import is_frontend, with_rank_of_name
from moe_trace.timeline.additions import read_added


class _CarrierArgs(msgspec.Struct, gc=False):
    moe_trace: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Carrier(msgspec.Struct, gc=False):
    """An event of which only the recording is decoded, if it has one."""

    args: _CarrierArgs | None = None


_carriers = msgspec.json.Decoder(list[_Carrier]).decode
_decode_carrier = msgspec.json.Decoder(_Carrier).decode


def _carrier(text: bytes) -> _Carrier:
    """Decode one event of a batch that cannot be decoded as a whole; a malformed one has no recording."""
    try:
        return _decode_carrier(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Carrier()


@dataclass(frozen=True, eq=False)
class TraceFile:
    """Contents of one trace."""

    path: Path
    recording: Recording
    events: EventTable
    devices: tuple[str, ...]
    """Names of the accelerators, from `deviceProperties`."""
    base_time_ns: int = 0
    """Origin of the events' times on the host's clock."""
    host_name: str | None = None
    """Name of the host, or None if torch's release did not write it."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Ranks of the process groups with more than one member, from `distributedInfo`."""
    head: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """JSON of the top-level keys before the events, and of `KEYS` anywhere."""
    merged: MergedRanks | None = None
    """Ranks in the file if it is a merged trace."""


def split_ranks(trace: TraceFile) -> list[TraceFile]:
    """Split a merged trace into one trace per rank; other traces are reduced to the recorded process.

    Raises:
        TraceFileError: The parts do not add up to the whole.
    """
    if trace.merged is None:
        return [replace(trace, events=events_of_recording(trace.events, trace.recording.samples))]
    try:
        recordings = rank_recordings(trace.recording, trace.merged)
    except TraceFileError as error:
        raise TraceFileError(f"{trace.path}: {error}") from error
    return [
        replace(
            trace,
            recording=recording,
            events=replace(
                events_of(trace.events, part.pids), unreadable=0 if i else trace.events.unreadable
            ),
            host_name=part.host_name,
            groups=part.groups,
        )
        for i, (recording, part) in enumerate(zip(recordings, trace.merged.parts, strict=True))
    ]


def read_trace(path: Path, progress: Progress | None = None) -> TraceFile:
    """Read a trace with moe_trace data in one pass.

    Raises:
        TraceFileError: Missing, empty, truncated, not JSON, from another tool, or without moe_trace data.
    """
    with open_trace_stream(path, progress) as stream:
        found = _Found(with_events=True)
        for key in stream.walk():
            found.take(key, stream)
    _require_events(path, found)
    assert found.events is not None
    recording, merged = _take_recording(path, found.recording)
    head = {key: found.head.get(key, b"null") for key in KEYS}
    return TraceFile(
        path=path,
        recording=recording,
        merged=merged,
        events=found.events.build(),
        devices=device_names(head["deviceProperties"]),
        base_time_ns=base_time(head["baseTimeNanoseconds"]),
        host_name=host_name(head["host_name"]),
        groups=group_ranks(head["distributedInfo"]),
        head=found.head,
    )


def read_recording(path: str | Path) -> Recording:
    """Read what moe_trace added to one trace file, without decoding the trace's own events.

    For a plain `.json` as written by moe_trace this reads only the end of the file, regardless of its size.

    Raises:
        TraceFileError: See `read_trace`.
    """
    return _read_added(Path(path))[0]


def read_rank_recordings(path: str | Path) -> tuple[list[Recording], bool]:
    """Return the recording of each rank, and whether the file is a merged trace.

    Raises:
        TraceFileError: See `read_trace`; or the ranks do not add up to the whole.
    """
    recording, merged = _read_added(Path(path))
    if merged is None:
        return [recording], False
    try:
        return rank_recordings(recording, merged), True
    except TraceFileError as error:
        raise TraceFileError(f"{path}: {error}") from error


def _read_added(path: Path) -> tuple[Recording, MergedRanks | None]:
    with opened(path) as (raw, plain):
        spliced = read_added(raw) if plain is raw else None
        if spliced is not None:
            return _take_recording(path, spliced)
        raw.seek(0)
        found = _Found(with_events=False)
        stream = JsonStream(plain.read, str(path))
        for key in stream.walk():
            found.take(key, stream)
    _require_events(path, found)
    return _take_recording(path, found.recording)


class _Found:
    """Top-level values of interest, collected while the file is read."""

    def __init__(self, *, with_events: bool) -> None:
        self.events = EventTableBuilder() if with_events else None
        self.has_events = False
        self.recording: bytes | None = None
        self.head: dict[str, bytes] = {}

    def take(self, key: str, stream: JsonStream) -> None:
        if key == "traceEvents":
            self.has_events = True
            self._take_events(stream)
        elif key == METADATA_KEY and self.recording is None:  # as older releases or the user wrote it
            self.recording = stream.value()
        elif not self.has_events or (key in KEYS and key not in self.head):
            self.head[key] = stream.value()
        else:
            stream.skip()

    def _take_events(self, stream: JsonStream) -> None:
        if self.events is not None:
            self.events.read(stream)
            self.recording = self.events.recording or self.recording
            return
        for batch in stream.batches(_carriers, _carrier):
            for event in batch:
                if event.args is not None and event.args.moe_trace is not msgspec.UNSET:
                    self.recording = bytes(event.args.moe_trace)


def _require_events(path: Path, found: _Found) -> None:
    if not found.has_events:
        if path.name.endswith(REDUCED_SUFFIX):
            raise TraceFileError(f"{path}: {NO_EVENTS}")
        raise TraceFileError(
            f"{path}: found JSON without `traceEvents`, expected a trace of torch.profiler; "
            "give the file that prof.export_chrome_trace wrote"
        )


def _take_recording(path: Path, text: bytes | None) -> tuple[Recording, MergedRanks | None]:
    """Decode the value of the `moe_trace` key.

    Raises:
        TraceFileError: It is missing, or does not follow the schema.
    """
    if text is None and is_frontend(path.name):
        raise TraceFileError(
            f"{path}: found the trace of vLLM's frontend (async_llm), in which no model runs; give those of "
            "its workers, which lie in the same folder"
        )
    if text is None:
        raise TraceFileError(
            f"{path}: found a trace without moe_trace data; record it with moe_trace.profile, or add the "
            "routing with moe_trace.merge_into(path, tracer.samples())"
        )
    try:
        payload = decode_payload(text)
        recording, merged = decode_recording(payload), decode_merged(payload)
        return (recording if merged is not None else with_rank_of_name(recording, path)), merged
    except TraceFileError as error:
        raise type(error)(f"{path}: {error}") from error


def decode_payload(text: bytes) -> Any:
    """Decode the JSON of a recording, except for its samples, which stay encoded.

    Raises:
        TraceFileError: It is not JSON.
    """
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        return {key: v if key == SAMPLES_KEY else msgspec.json.decode(v) for key, v in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            return loads_lenient(text)
        except ValueError as error:
            raise TraceFileError(
                f"the moe_trace data is not JSON ({error}); the file was changed after it was written"
            ) from error
