"""Combine several traces: each is reduced separately, then they are added up rank by rank."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moe_trace.data.calls.table import CallTable
from moe_trace.data.errors import SchemaError, TraceFileError
from moe_trace.data.lost_sums import add_lost
from moe_trace.data.schema import Recording, RouterInfo
from moe_trace.data.trace_json.coverage import coverage_notes
from moe_trace.read.file.opening import Progress
from moe_trace.read.file.worker_names import frontends_beside
from moe_trace.read.ranks.inputs import call_numbers
from moe_trace.read.ranks.same_run import first_difference, pooled, said_again
from moe_trace.read.reduced.file import decode, is_reduced, trace_of
from moe_trace.read.reduced.inputs import load
from moe_trace.read.reduced.trace import ReducedTrace


def read_all(files: Sequence[Path], progress: Progress | None) -> list[ReducedTrace]:
    """Read the files, with several processes if there are many; a merged trace yields one result per rank.

    A merged trace next to its parts is left out, since it repeats them. So is a trace that cannot be read if
    others can: a rank that died must not hide the others.

    Raises:
        TraceFileError: None of the files can be read.
    """
    next_call: dict[str, int] = {}
    reads: list[ReducedTrace] = []
    broken: list[TraceFileError] = []
    for found in _load_all(files, progress):
        if isinstance(found, SchemaError):
            raise found
        if isinstance(found, TraceFileError):
            broken.append(found)
            continue
        for part in found:  # numbers may restart at 0 in each file
            is_only = len(files) == 1 and part.alignment is None
            reads.append(
                part.numbered(part.own_numbers if is_only else call_numbers(part.recording, next_call))
            )
    if broken and not reads:
        raise broken[0]
    facts = [(read.path, read.recording, read.alignment is not None) for read in reads]
    duplicates, notes = left_out(facts, broken)
    kept = [read for read in reads if read.path not in duplicates]
    return [replace(kept[0], notes=(*kept[0].notes, *notes, *_missing_traces_note(files))), *kept[1:]]


def left_out(
    reads: Sequence[tuple[Path, Recording, bool]], broken: Sequence[TraceFileError]
) -> tuple[Collection[Path], list[str]]:
    """Return files that only repeat others (`said_again`), and a note on each of them and each broken one."""
    repeats = said_again(reads)
    notes = [f"{path.name} was left out: {why}" for path, why in sorted(repeats.items())]
    return repeats, [*notes, *(f"one of the traces was left out: {error}" for error in broken)]


def _missing_traces_note(files: Sequence[Path]) -> list[str]:
    count = sum(is_reduced(file) and not os.path.exists(trace_of(file)) for file in files)
    if not count:
        return []
    which = "the trace" if len(files) == 1 else f"{count} of {len(files)} traces"
    are, it_was = ("is", "it was") if count == 1 else ("are", "they were")
    return [f"{which} {are} gone: these figures are from what {it_was} reduced to"]


def _load_all(
    files: Sequence[Path], progress: Progress | None
) -> Iterator[list[ReducedTrace] | TraceFileError]:
    unreduced = [file for file in files if not is_reduced(file)]
    texts = None
    if len(unreduced) > 1:
        from moe_trace.read.reduced.workers import reduce_files, worth

        processes = worth(unreduced)
        texts = reduce_files(unreduced, processes) if processes > 1 else None
    done, total = 0, sum(file.stat().st_size for file in files if os.path.exists(file))
    for file in files:
        try:
            if texts is None or is_reduced(file):
                yield load(file, progress if texts is None else None)
            else:
                text = next(texts)
                yield text if isinstance(text, TraceFileError) else decode(text, file)
        except TraceFileError as error:
            yield error
        done += file.stat().st_size if os.path.exists(file) else 0
        if progress is not None and texts is not None:
            progress(done, total)


def combined(reads: Sequence[ReducedTrace], label: str) -> Recording:
    """Combine recordings; ranks that route the same tokens count once, by the first of them.

    Raises:
        TraceFileError: The traces are of different models or runs.
    """
    recordings = [read.recording for read in reads]
    first = recordings[0]
    if len(recordings) == 1:
        return first
    from moe_trace.read.ranks.loads import RankRecords

    counting = RankRecords(by_rank={r.rank: r for r in reversed(recordings)}).counting_ranks()
    found = first_difference(recordings)
    if found is not None:
        files = " and ".join(dict.fromkeys(reads[i].path.name for i in found[:2]))
        raise TraceFileError(
            f"{label}: {files} are not of one run ({found[2]}); give the files or the folder of one run"
        )
    called = {name for recording in recordings for name in recording.calls.name.tolist()}
    routers: dict[str, RouterInfo] = {}
    for recording in recordings:
        for router in recording.routers:
            routers.setdefault(router.name, router)
    return replace(
        first,
        routers=tuple(routers.values()),
        samples=CallTable.concatenated([r.calls for r in recordings if r.rank in counting]),
        lost=add_lost([r.lost for r in recordings], called),
    )


def notes_of(reads: Sequence[ReducedTrace]) -> list[str]:
    """Return notes on the traces for the reader of a report."""
    notes = []
    unreadable = sum(r.unreadable for r in reads)
    if unreadable:
        notes.append(
            f"{unreadable} events of the trace could not be read (odd times or broken text) and are left out"
        )
    notes += [
        f"{r.path.name} holds the events of {r.processes} processes, put together by another tool: these "
        "figures are of the one whose router calls were recorded; give each rank's own trace"
        for r in reads
        if r.processes > 1
    ]
    notes += pooled([(r.path.name, r.recording.rank) for r in reads])
    notes += frontends_beside(r.path for r in reads)
    notes += coverage_notes([r.times.coverage for r in reads])
    if any(r.recording.experts_are_split for r in reads):
        notes.append(
            "experts are split over ranks: a rank computes other slots than its routers assigned, so no "
            "speed of its experts is given"
        )
    placed = sum(len(r.times.samples) for r in reads)
    if not placed and any(r.recording.samples for r in reads):
        notes.append("no call has its ranges in the trace, so there are no phases and no device times")
    return [*notes, *dict.fromkeys(note for read in reads for note in read.notes)]


def notes_alone(recording: Recording) -> list[str]:
    """Return a note on a trace of one rank without the others."""
    if recording.world_size < 2:
        return []
    return [
        f"this is rank {recording.rank} alone, of {recording.world_size}: what the others computed is not in "
        "these figures; give the folder with the traces of all ranks"
    ]
