"""The ranks inside one merged trace: which events and which calls are whose.

`merge` keeps every rank's calls in one recording, rank after rank, and beside it (key `ranks` of the
`moe_trace` data) a part for each rank: how many of the calls are its own, which processes, what it knew of
itself.
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
    """How far apart the ranks end the collectives that they share, in microseconds."""

    median_us: float
    p95_us: float
    max_us: float


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How the ranks' clocks stand to each other."""

    reference: int
    """The rank whose clock is kept."""
    offset_ns: Mapping[int, int]
    """By rank: what is added to its times to get the reference's."""
    unaligned: tuple[int, ...]
    """Ranks that share no matched collective with the reference, not even through others. They are aligned
    among themselves, where they share any; the first of them keeps its clock."""
    collectives: int
    """How many the estimate rests on."""
    same_host: bool
    """Whether all ranks share one host's clock, which was kept."""
    before: Spread | None
    after: Spread | None
    """The residual; None where nothing is shared."""
    early_before: int
    """Receives that end before their send began, as recorded."""
    early_after: int
    """The same after alignment: 0, unless the clocks drift more than the collectives take."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class RankPart:
    """What belongs to one rank of a merged trace."""

    rank: int
    file: str
    """Name of the file that it came from."""
    samples: int
    """How many of the recording's samples, in the order of the parts."""
    pids: tuple[int | str, ...]
    """Its processes in the merged trace."""
    lost: Lost
    parallel: Parallel | None
    held: tuple[tuple[int, ...] | None, ...]
    """By router of the recording: `RouterInfo.held_experts` of this rank."""
    host_name: str | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedRanks:
    """The ranks of a merged trace, and how they came together."""

    parts: tuple[RankPart, ...]
    alignment: Alignment
    missing: tuple[int, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    """File -> why it is not among the parts."""
    unreadable: dict[int, int] = field(default_factory=dict)
    """Rank -> how many of its events could not be read; the others are there."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        left_out = self.left_out.items()
        return (
            *(f"{file} was left out when the ranks were merged: {why}" for file, why in left_out),
            *(
                f"{count} events of rank {rank} could not be read when the ranks were merged"
                for rank, count in self.unreadable.items()
            ),
        )


def decode_merged(payload: Any) -> MergedRanks | None:
    """None for the recording of one process.

    Raises:
        TraceFileError: the key is there, but of another form.
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
    """The recording of each rank, in the order of the parts.

    Raises:
        TraceFileError: the parts do not add up to the recording.
    """
    total = sum(part.samples for part in merged.parts)
    fits = all(len(p.held) == len(recording.routers) and p.samples >= 0 for p in merged.parts)
    twice = len({part.rank for part in merged.parts}) != len(merged.parts)
    if total != len(recording.samples) or not fits or twice:
        raise TraceFileError(
            f"found {total} calls of {len(merged.parts)} merged ranks, but {len(recording.samples)} in all; "
            "the file was changed after it was written"
        )
    found, first = [], 0
    for part in merged.parts:
        routers = zip(recording.routers, part.held, strict=True)
        found.append(
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
    return found


def events_of(events: EventTable, pids: Sequence[int | str]) -> EventTable:
    """The events of some processes."""
    mine = np.array([pid in set(pids) for pid, _ in events.threads], dtype=bool)
    kept = events.select(mine[events.thread] if len(mine) else np.zeros(len(events), dtype=bool))
    return replace(kept, comms=tuple(c for c in events.comms if mine[c.thread]))
