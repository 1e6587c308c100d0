"""Counts per expert from traces, one observation per step, summed over the ranks of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_trace.data.calls.table import NONE, load_by_step
from moe_trace.data.errors import SchemaError, TraceFileError, UsageError
from moe_trace.data.schema import Recording, RouterInfo
from moe_trace.data.summary import model_name
from moe_trace.placement.counts import ExpertCounts, Layer
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.trace_file import read_rank_recordings
from moe_trace.read.ranks.loads import RankRecords
from moe_trace.read.reduced.combine import left_out
from moe_trace.read.reduced.file import is_reduced
from moe_trace.read.reduced.inputs import find_inputs, load
from moe_trace.read.time.peaks import hidden_bytes

_StepKey = tuple[int, int]
"""(number of earlier files of the same rank, step)"""


def counts_of_traces(path: str | Path, chosen: Filter | None = None) -> ExpertCounts:
    """Read the load of a trace, of a merged trace, or of all traces in a folder.

    Ranks that share their tokens count once. Recomputed calls, identity experts and skipped slots are
    excluded.

    Raises:
        TraceFileError: No file can be read, or an unreadable one is not a rank of a larger run.
        UsageError: Nothing is left, or the layers have different numbers of experts.
    """
    recordings, notes = _read_all(find_inputs(path))
    counts = counts_of_recordings(recordings, str(path), chosen)
    return replace(counts, notes=(*notes, *counts.notes))


def _read_all(files: Sequence[Path]) -> tuple[list[Recording], list[str]]:
    """Read files as reports do: an unreadable rank does not hide the others, and no call counts twice."""
    reads: list[tuple[Path, Recording, bool]] = []
    broken: list[TraceFileError] = []
    for file in files:
        try:
            if is_reduced(file):
                parts = load(file)
                recordings = [part.recording for part in parts]
                is_merged = any(part.alignment is not None for part in parts)
            else:
                recordings, is_merged = read_rank_recordings(file)
        except SchemaError:
            raise
        except TraceFileError as error:
            broken.append(error)
            continue
        reads += [(file, recording, is_merged) for recording in recordings]
    duplicates, notes = left_out(reads, broken)
    kept = [recording for file, recording, _ in reads if file not in duplicates]
    if broken and all(recording.world_size == 1 for recording in kept):
        raise broken[0]
    return kept, notes


def counts_of_recordings(
    recordings: Sequence[Recording], source: str, chosen: Filter | None = None
) -> ExpertCounts:
    """Like `counts_of_traces`, for recordings that were already read.

    Raises:
        UsageError: Nothing is left, or the layers have different numbers of experts.
    """
    chosen = chosen or Filter()
    routers = _routers(recordings, source, chosen)
    size = routers[0].num_experts - routers[0].identity_experts
    names = [router.name for router in routers]
    steps: dict[_StepKey, np.ndarray] = {}
    parts = _distinct(recordings)
    for run, recording in parts:
        calls = chosen.narrow(recording).calls
        for step, counts_LE in zip(*load_by_step(calls, names, least=size), strict=True):
            row = steps.setdefault((run, int(step)), np.zeros((len(routers), size), np.int64))
            row += counts_LE[:, :size]
    if not steps:
        raise UsageError(
            f"{source}: found no router call to plan by; choose other layers, steps or phases, or record some"
        )
    keys = sorted(steps)
    several_runs = len({run for run, _ in keys}) > 1
    return ExpertCounts(
        source=source,
        model=model_name(recordings[0].model),
        kind="step",
        labels=tuple(f"{run}:{step}" if several_runs else str(step) for run, step in keys),
        layers=tuple(_layer(router, recordings) for router in routers),
        counts_SLE=np.stack([steps[key] for key in keys]),
        notes=_notes(recordings, parts),
    )


def _distinct(recordings: Iterable[Recording]) -> list[tuple[int, Recording]]:
    """Return recordings with distinct tokens, each with the number of its run in the folder."""
    runs: dict[int, dict[int, Recording]] = {}
    seen: Counter[int] = Counter()
    for recording in recordings:
        runs.setdefault(seen[recording.rank], {})[recording.rank] = recording
        seen[recording.rank] += 1
    return [
        (number, by_rank[rank])
        for number, by_rank in runs.items()
        for rank in RankRecords(by_rank=by_rank).counting_ranks()
    ]


def _routers(recordings: Sequence[Recording], source: str, chosen: Filter) -> list[RouterInfo]:
    known: dict[str, RouterInfo] = {}
    for recording in recordings:
        for router in filter(chosen.takes_router, recording.routers):
            first = known.setdefault(router.name, router)
            if first.num_experts != router.num_experts:
                raise UsageError(
                    f"{source}: the traces are of different models ({router.name} has {first.num_experts} "
                    f"and {router.num_experts} experts); give one of the files"
                )
    routers = sorted(known.values(), key=lambda r: (r.layer, r.site))
    sizes = sorted({router.num_experts - router.identity_experts for router in routers})
    if len(sizes) != 1:
        raise UsageError(
            f"{source}: found layers of {', '.join(map(str, sizes)) or 'no'} experts, expected one number "
            "for all; choose the layers with --layer"
        )
    return routers


def _layer(router: RouterInfo, recordings: Sequence[Recording]) -> Layer:
    """Use the recorded bytes per slot, or else the model's hidden size times the size of its dtype."""
    slot_bytes = hidden_bytes(recordings[0].model)
    for recording in reversed(recordings):
        calls = recording.calls
        known = np.flatnonzero(calls.of_router(router.name) & (calls.slot_bytes != NONE))
        slot_bytes = int(calls.slot_bytes[known[0]]) if len(known) else slot_bytes
    return Layer(site=router.site, name=router.name, layer=router.layer, slot_bytes=slot_bytes)


def _notes(recordings: Sequence[Recording], parts: Sequence[tuple[int, Recording]]) -> tuple[str, ...]:
    notes = []
    world = max(r.world_size for r in recordings)
    ranks = {r.rank for r in recordings}
    if len(ranks) < world and any(
        r.parallel is None or len(r.parallel.token_ranks) < world for r in recordings
    ):
        notes.append(
            f"the run had {world} ranks, and only {len(ranks)} are here: the others' tokens are missing"
        )
    if len(parts) < len(recordings):
        copies = len(recordings) - len(parts)
        notes.append(
            f"{copies} {'rank' if copies == 1 else 'ranks'} routed the same tokens as another; those count "
            "once"
        )
    runs = {run for run, _ in parts}
    if len(runs) > 1:
        notes.append(f"{len(runs)} runs; each one's steps stand by themselves (run:step)")
    return tuple(notes)
