"""Whether the all-to-alls moved what the counts say, to the byte, in both directions.

The dispatch takes slots to the experts' ranks, the combine takes their results back, one hidden state each:

    dispatch   in split  = slots this rank sends to each rank        out split = slots each rank sends it
    combine    in split  = slots each rank sent it                   out split = slots it sent to each rank

times the bytes of a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.data.display.json import attributes
from moe_trace.data.schema import Recording, RoutingSample
from moe_trace.read.ranks.collective_times import SampleIndex
from moe_trace.read.ranks.collectives import Collective, split_bytes
from moe_trace.read.ranks.loads import CallLoad, RankRecords
from moe_trace.read.ranks.shared_calls import RankCalls
from moe_trace.read.time.peaks import hidden_bytes

SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ByteMismatch:
    """One all-to-all that moved other bytes than the counts say."""

    site: str
    step: int
    rank: int
    part: str
    direction: str
    """`sent` or `received`."""
    peer: int
    expected_bytes: int
    found_bytes: int


@dataclass(frozen=True, kw_only=True)
class BytesCheck:
    """All-to-alls compared with the counts; each is two comparisons, one a direction."""

    equal: int
    different: int
    unknown: int
    """The trace has no split sizes, or no counts of the other rank."""
    mismatches: tuple[ByteMismatch, ...]
    """The first of them."""


def check_bytes(
    records: RankRecords,
    ranks: Sequence[RankCalls],
    loads: Sequence[CallLoad],
    index: Mapping[int, SampleIndex],
) -> BytesCheck:
    """Compare every dispatch and combine of the layers with the counts."""
    sent = {load.key: load.sent_RW for load in loads if load.sent_RW is not None and load.exact}
    rows = {rank: row for row, rank in enumerate(records.ranks)}
    equal = different = unknown = 0
    mismatches: list[ByteMismatch] = []
    for one in ranks:
        group = records.parallel(one.rank).expert_ranks
        for collective in one.collectives:
            found = index[one.rank].of(collective)
            if found is None or collective.role not in ("dispatch", "combine") or not group:
                continue
            about: Any = {**attributes(found[1], "site", "step"), "rank": one.rank, "part": collective.role}
            for side in ("sent", "received"):
                slots = _slots(sent.get(found[0]), rows, one.rank, group, side)
                both = _both(records.by_rank[one.rank], found[1], collective, slots, side)
                if both is None:
                    unknown += 1
                    continue
                if both[0] == both[1]:
                    equal += 1
                    continue
                different += 1
                wrong = [i for i, (want, have) in enumerate(zip(*both, strict=True)) if want != have]
                mismatches += [
                    ByteMismatch(
                        **about, direction=side, peer=group[i], expected_bytes=want[i], found_bytes=have[i]
                    )
                    for want, have in (both,)
                    for i in wrong[: max(0, SHOWN - len(mismatches))]
                ]
    return BytesCheck(equal=equal, different=different, unknown=unknown, mismatches=tuple(mismatches))


def _slots(
    sent_RW: npt.NDArray[np.int64] | None,
    rows: Mapping[int, int],
    rank: int,
    group: Sequence[int],
    side: str,
) -> list[int] | None:
    """[G] slots between this rank and each of its group; None where a rank of it was not recorded."""
    if sent_RW is None:
        return None
    if side == "sent":
        return list(map(int, sent_RW[rows[rank], list(group)].tolist()))
    if any(peer not in rows for peer in group):
        return None
    return list(map(int, sent_RW[[rows[peer] for peer in group], rank].tolist()))


def _both(
    recording: Recording, sample: RoutingSample, collective: Collective, slots: list[int] | None, side: str
) -> tuple[list[int], list[int]] | None:
    """Expected and found bytes by rank of the group."""
    size = slot_bytes(recording, sample)
    if slots is None or size is None:
        return None
    # What the dispatch sends comes back in the combine, so there it is what comes out.
    into = (side == "sent") == (collective.role == "dispatch")
    found = split_bytes(collective, "in" if into else "out", len(slots))
    return None if found is None else ([n * size for n in slots], found)


def slot_bytes(recording: Recording, sample: RoutingSample) -> int | None:
    """Bytes of a slot's hidden state; from the model's width and type where the call does not say."""
    if sample.slot_bytes is not None:
        return sample.slot_bytes
    return hidden_bytes(recording.model)
