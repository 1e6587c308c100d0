"""Insertion of the band and the recording in a trace file, leaving the bytes that Kineto wrote unchanged."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.codec import encode_recording
from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.errors import MoETraceError, NothingRecorded, TraceFileError
from moe_trace.data.files import trace_path_error, whole_file
from moe_trace.data.lost_sums import add_lost
from moe_trace.data.schema import Lost, Recording, RouterInfo, RoutingSample, Span
from moe_trace.data.trace_json.windows import EventBytes
from moe_trace.timeline.additions import encode_addition, insert_addition, remove_additions
from moe_trace.timeline.compiled_spans import with_compiled_spans
from moe_trace.timeline.correlate.calls import Placed, TraceClock, place_samples
from moe_trace.timeline.correlate.graphs import place_in_graphs
from moe_trace.timeline.correlate.launches import read_launches
from moe_trace.timeline.correlate.reasons import MissingRanges
from moe_trace.timeline.correlate.scan import RangeSearch, trace_window
from moe_trace.timeline.counter_tracks import Tracks, band_events, band_label
from moe_trace.timeline.placed_calls import PlacedCalls

_COPY_BYTES = 4 * 2**20
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Merged:
    """Result of a merge: the samples of this trace with their placements, and counts of unmatched ones."""

    placed: list[CallTable]
    """Calls by recording, in the given order."""
    lost: Lost
    """Only what this merge lost: samples without a range, ranges without a sample."""


def merge_into(trace_path: str | Path, samples: Recording | Sequence[RoutingSample]) -> None:
    """Merge routing samples into a trace that `torch.profiler` wrote: counters, lanes and the recording.

    Merging into a trace again replaces what the earlier merge added.

    Args:
        trace_path: a `.json` or `.json.gz` trace; replaced atomically, or left unchanged.
        samples: `tracer.samples()`, or `tracer.recording()`, which also has the model's description.

    Raises:
        NothingRecorded: there is no sample, or none was taken while a profiler recorded.
        TraceFileError: the file is not a complete trace of torch.profiler.
        OutputError: the result cannot be written.
    """
    recording = samples if isinstance(samples, Recording) else recording_of(samples)
    if not recording.samples:
        raise NothingRecorded(
            f"found no routing sample to merge into {trace_path}; run the model while the tracer is active, "
            "and check layers=, every= and warmup="
        )
    if not recording.calls.profiled.any():
        raise NothingRecorded(
            f"found {len(recording.samples)} routing samples, but no profiler was recording when they were "
            f"taken, so {trace_path} cannot hold them; run the model inside the profiler's active steps"
        )
    merge_recording(Path(trace_path), [recording])


def recording_of(samples: Sequence[RoutingSample]) -> Recording:
    """Return a recording that describes the model only as far as its samples do."""
    routers = {sample.name: _router_of(sample) for sample in samples}
    return Recording(
        model={"name": None, "class": None, "num_layers": None, "num_moe_layers": len(routers)},
        options={},
        routers=tuple(routers.values()),
        samples=tuple(samples),
        lost=Lost(),
    )


def _router_of(sample: RoutingSample) -> RouterInfo:
    return RouterInfo(
        site=sample.site,
        name=sample.name,
        layer=sample.layer,
        router_class="unknown",
        experts_class=None,
        contract="unknown",
        num_experts=len(sample.assignments),
        top_k=sample.top_k,
        router_flops_per_token=sample.router_flops // max(1, sample.tokens),
        expert_flops_per_slot=sample.expert_flops // max(1, sample.computed_slots),
    )


def merge_recording(path: Path, recordings: Sequence[Recording], *, tracks: Tracks = ("band",)) -> Merged:
    """Merge into an existing file, which is replaced atomically."""
    try:
        source = path.open("rb")
    except OSError as error:
        raise trace_path_error(path, error) from error
    with source, whole_file(path) as target:
        packed = source.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC  # the file name is unreliable
        source.seek(0)
        plain = target.with_name(f"{target.name}.plain") if packed else target
        _copy(source, plain, packed=packed)
        try:
            merged = merge_in_place(plain, recordings, tracks=tracks)
        except MoETraceError as error:
            raise type(error)(str(error).replace(str(plain), str(path))) from error
        if not any(merged.placed):
            raise NothingRecorded(
                f"{path}: none of the samples was taken in the time that this trace covers; it was left as "
                "it was - merge into the trace of the run that the samples come from"
            )
        if packed:
            compress(plain, target)
    return merged


def _copy(source: BinaryIO, plain: Path, *, packed: bool) -> None:
    unpacked = gzip.GzipFile(fileobj=source) if packed else source
    try:
        with plain.open("wb") as copy:
            shutil.copyfileobj(unpacked, copy, _COPY_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceFileError(
            f"{source.name}: expected a gzip-compressed trace, but {error}; the file is truncated or of "
            "another kind - export it again"
        ) from error


def compress(plain: Path, target: Path) -> None:
    """Compress a finished file with gzip."""
    with plain.open("rb") as source, gzip.open(target, "wb", compresslevel=6) as packed:
        shutil.copyfileobj(source, packed, _COPY_BYTES)


def merge_in_place(
    path: Path,
    recordings: Sequence[Recording],
    *,
    tracks: Tracks = ("band",),
    activities: Collection[str] | None = None,
) -> Merged:
    """Merge into a temporary file, without the copy that protects a user's file.

    Args:
        activities: names of the profiler's activities, to explain missing ranges; None if unknown.
    """
    with path.open("r+b") as file:
        search = RangeSearch()
        layout = remove_additions(file, search)
        trace_events = EventBytes(file, layout.events.start, layout.events.end)
        window = trace_window(trace_events)
        if window is None:
            raise NothingRecorded(f"{path}: the trace holds no event, so that no sample lies in its time")
        renamed = _with_unique_names(recordings)
        placed = _place(trace_events, search, renamed, layout.base_time_ns, window, activities)
        combined = _combine(renamed, placed)
        band = PlacedCalls.of(
            combined.calls,
            experts_are_split=combined.experts_are_split,
            by_compiler=bool(combined.compiled_graphs) and not combined.captured_graphs,
        )
        addition = encode_addition(
            b",\n".join(band_events(band, rank=combined.rank, tracks=tracks)),
            band_label(combined.rank, band.start_us if len(band) else window.start_us),
            encode_recording(combined),
            offset=layout.events.end,
            first=layout.events.empty,
        )
        insert_addition(file, layout.events.end, addition)
    lost = Lost(**placed.lost())
    return Merged(
        [_own_samples(recording, own, placed) for recording, own in zip(recordings, renamed, strict=True)],
        lost,
    )


def _with_unique_names(recordings: Sequence[Recording]) -> list[Recording]:
    """Make module paths unique across recordings, as models of one class have the same paths."""
    names = [router.name for recording in recordings for router in recording.routers]
    if len(set(names)) == len(names):
        return list(recordings)
    return [_prefixed(recording, f"model{i}.") for i, recording in enumerate(recordings)]


def _prefixed(recording: Recording, prefix: str) -> Recording:
    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    return replace(
        recording,
        routers=tuple(replace(router, name=prefix + router.name) for router in recording.routers),
        samples=_renamed(recording.calls, lambda name: prefix + name),
        captured_graphs=tuple(
            replace(graph, calls=tuple(replace(call, name=prefix + call.name) for call in graph.calls))
            for graph in recording.captured_graphs
        ),
        compiled_graphs=tuple(
            replace(graph, parts=tuple(replace(part, routers=renamed(part.routers)) for part in graph.parts))
            for graph in recording.compiled_graphs
        ),
    )


def _renamed(calls: CallTable, name: Callable[[str], str]) -> CallTable:
    return replace(calls, keys=tuple(key._replace(name=name(key.name)) for key in calls.keys))


def _own_samples(recording: Recording, named: Recording, placed: Placed) -> CallTable:
    """Return one recording's placed samples, under their original names."""
    original = {own.name: router.name for router, own in zip(recording.routers, named.routers, strict=True)}
    own = np.array([key.name in original for key in placed.samples.keys], bool)
    return _renamed(placed.samples.take(own[placed.samples.router]), lambda name: original.get(name, name))


def _place(
    events: EventBytes,
    search: RangeSearch,
    recordings: Sequence[Recording],
    base_time_ns: int,
    window: Span,
    activities: Collection[str] | None,
) -> Placed:
    ranges = search.found(events)
    missing = MissingRanges(events, {event.tid for event in ranges if not event.on_device}, activities)
    placed = place_samples(
        CallTable.concatenated([recording.calls for recording in recordings]),
        ranges,
        base_time_ns=base_time_ns,
        window=window,
        why=missing.why,
    )
    if not placed.samples.in_graph.any():
        return placed
    return place_in_graphs(
        placed,
        recordings,
        ranges=ranges,
        launches=read_launches(events),
        missing=missing,
        clock=TraceClock(base_time_ns, window),
        timed=lambda calls: with_compiled_spans(calls, _compiled_graphs(recordings), events),
    )


def _compiled_graphs(recordings: Sequence[Recording]) -> tuple[CompiledGraph, ...]:
    return tuple(dict.fromkeys(graph for recording in recordings for graph in recording.compiled_graphs))


def _combine(recordings: Sequence[Recording], placed: Placed) -> Recording:
    """Combine the recordings of all tracers into one with only the samples of this trace."""
    first = recordings[0]
    lost = replace(
        add_lost([recording.lost for recording in recordings], called=()),
        **placed.lost(),
    )
    model = first.model
    if len(recordings) > 1:
        names = " + ".join(str(r.model.get("name")) for r in recordings)
        model = {**first.model, "name": names, "models": [r.model for r in recordings]}
        # Each tracer counts its own forwards, so one list of marks would be ambiguous.
        first = replace(first, graph_marks=(), captured_graphs=(), graphs_compiled=False, annotated_nodes={})
    return replace(
        first,
        model=model,
        routers=tuple(router for r in recordings for router in r.routers),
        samples=placed.samples,
        lost=lost,
        compiled_graphs=_compiled_graphs(recordings),
    )
