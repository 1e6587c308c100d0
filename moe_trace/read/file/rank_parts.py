"""Separate the ranks of a merged trace, by events and by calls.

`merge` stores every rank's calls in one recording, rank after rank, and under the key `ranks` of the
`moe_trace` data a part for each rank: its number of calls, its processes, and its own metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import Lost, Parallel, Recording
from moe_trace.data.trace_json.events import EventTable

RANKS_KEY = "ranks"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Distribution of the differences, in microseconds, between ranks' ends of shared collectives."""

    median_us: float
    p95_us: float
    max_us: float


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Alignment of the ranks' clocks."""

    reference: int
    """Rank whose clock is kept."""
    offset_ns: Mapping[int, int]
    """Offset by rank that is added to its times to get the reference's."""
    unaligned: tuple[int, ...]
    """Ranks that share no matched collective with the reference, not even through other ranks. They are
    aligned among themselves if they share any; the first of them keeps its clock."""
    collectives: int
    """Number of collectives that the estimate is based on."""
    same_host: bool
    """Whether all ranks share one host's clock, which was kept."""
    before: Spread | None
    after: Spread | None
    """Residual after alignment; None if no collective is shared."""
    early_before: int
    """Number of receives that end before their send began, as recorded."""
    early_after: int
    """The same after alignment: 0, unless the clocks drift by more than the duration of the collectives."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class RankPart:
    """The part of a merged trace that belongs to one rank."""

    rank: int
    file: str
    """Name of the original file."""
    samples: int
    """Number of the recording's samples that belong to it, in the order of the parts."""
    pids: tuple[int | str, ...]
    """Its process ids in the merged trace."""
    lost: Lost
    parallel: Parallel | None
    held: tuple[tuple[int, ...] | None, ...]
    """`RouterInfo.held_experts` of this rank, by router of the recording."""
    host_name: str | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedRanks:
    """The ranks of a merged trace, with their alignment."""

    parts: tuple[RankPart, ...]
    alignment: Alignment
    missing: tuple[int, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason for each file that was left out."""
    unreadable: dict[int, int] = field(default_factory=dict)
    """Number of unreadable events by rank; the rank's other events are included."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the reader of a report."""
        left_out = self.left_out.items()
        return (
            *(f"{file} was left out when the ranks were merged: {why}" for file, why in left_out),
            *(
                f"{count} events of rank {rank} could not be read when the ranks were merged"
                for rank, count in self.unreadable.items()
            ),
        )


def decode_merged(payload: Any) -> MergedRanks | None:
    """Decode the merged ranks, or return None for the recording of one process.

    Raises:
        TraceFileError: The key is present, but has another form.
    """
    value = payload.get(RANKS_KEY) if isinstance(payload, dict) else None
    if value is None:
        return None
    try:
        return msgspec.convert(value, MergedRanks, str_keys=True)
    except msgspec.ValidationError as error:
        raise TraceFileError(
            f"found data of merged ranks of another form ({error}); the file was changed after it was written"
        ) from error


def rank_recordings(recording: Recording, merged: MergedRanks) -> list[Recording]:
    """Return the recording of each rank, in the order of the parts.

    Raises:
        TraceFileError: The parts do not add up to the recording.
    """
    total = sum(part.samples for part in merged.parts)
    fits = all(len(p.held) == len(recording.routers) and p.samples >= 0 for p in merged.parts)
    repeats_rank = len({part.rank for part in merged.parts}) != len(merged.parts)
    if total != len(recording.samples) or not fits or repeats_rank:
        raise TraceFileError(
            f"found {total} calls of {len(merged.parts)} merged ranks, but {len(recording.samples)} in all; "
            "the file was changed after it was written"
        )
    recordings, first = [], 0
    for part in merged.parts:
        routers = zip(recording.routers, part.held, strict=True)
        recordings.append(
            replace(
                recording,
                rank=part.rank,
                routers=tuple(replace(router, held_experts=held) for router, held in routers),
                samples=recording.samples[first : first + part.samples],
                lost=part.lost,
                parallel=part.parallel,
            )
        )
        first += part.samples
    return recordings


def events_of(events: EventTable, pids: Sequence[int | str]) -> EventTable:
    """Select the events of some processes."""
    is_selected = np.array([pid in set(pids) for pid, _ in events.threads], dtype=bool)
    kept = events.select(
        is_selected[events.thread] if len(is_selected) else np.zeros(len(events), dtype=bool)
    )
    return replace(kept, comms=tuple(c for c in events.comms if is_selected[c.thread]))
