"""Check the bytes of all-to-alls against the recorded counts, exactly and in both directions.

The dispatch sends slots to the experts' ranks, and the combine returns their results, one hidden state each:

    dispatch   in split  = slots this rank sends to each rank        out split = slots each rank sends it
    combine    in split  = slots each rank sent it                   out split = slots it sent to each rank

times the bytes of a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_trace.data.calls.table import IntArray
from moe_trace.data.schema import RoutingSample
from moe_trace.read.ranks.collective_costs import SampleIndex
from moe_trace.read.ranks.collective_times import split_bytes
from moe_trace.read.ranks.loads import CallLoad, RankRecords
from moe_trace.read.ranks.shared_calls import RankCalls
from moe_trace.read.time.peaks import hidden_bytes

SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ByteMismatch:
    """An all-to-all whose bytes differ from the counts."""

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
    """Result of comparing all-to-alls with the counts; each makes two comparisons, one per direction."""

    equal: int
    different: int
    unknown: int
    """Number without split sizes in the trace, or without counts of another rank."""
    mismatches: tuple[ByteMismatch, ...]
    """The first mismatches."""


def check_bytes(
    records: RankRecords,
    ranks: Sequence[RankCalls],
    loads: Sequence[CallLoad],
    index: Mapping[int, SampleIndex],
) -> BytesCheck:
    """Compare every dispatch and combine of the layers with the counts."""
    sent = {load.key: load.sent_RW for load in loads if load.exact}
    equal = different = unknown = 0
    mismatches: list[ByteMismatch] = []
    for rank_calls in ranks:
        group = records.parallel(rank_calls.rank).expert_ranks
        for collective in rank_calls.collectives:
            key, sample = index[rank_calls.rank].get(collective.call, (None, None))
            if key is None or sample is None or collective.role not in ("dispatch", "combine") or not group:
                continue
            for side in ("sent", "received"):
                expected = _expected(records, sent.get(key), sample, rank_calls.rank, group, side)
                # What the dispatch sends returns in the combine, where it is the output.
                is_input = (side == "sent") == (collective.role == "dispatch")
                measured = split_bytes(collective, "in" if is_input else "out", len(group))
                if expected is None or measured is None:
                    unknown += 1
                    continue
                differing = np.flatnonzero(expected != np.array(measured)).tolist()
                equal, different = equal + (not differing), different + bool(differing)
                mismatches += [
                    ByteMismatch(
                        site=sample.site,
                        step=sample.step,
                        rank=rank_calls.rank,
                        part=collective.role,
                        direction=side,
                        peer=group[i],
                        expected_bytes=int(expected[i]),
                        found_bytes=measured[i],
                    )
                    for i in differing[: SHOWN - len(mismatches)]
                ]
    return BytesCheck(equal=equal, different=different, unknown=unknown, mismatches=tuple(mismatches))


def _expected(
    records: RankRecords,
    sent_RW: IntArray | None,
    sample: RoutingSample,
    rank: int,
    group: Sequence[int],
    side: str,
) -> IntArray | None:
    """Return the bytes between this rank and each of its group, [G], or None if a rank is not recorded."""
    size = sample.slot_bytes
    if size is None:  # derived from the model's hidden size and dtype
        size = hidden_bytes(records.by_rank[rank].model)
    senders = (rank,) if side == "sent" else group
    if sent_RW is None or size is None or not set(senders) <= set(records.ranks):
        return None
    sent = sent_RW[np.searchsorted(records.ranks, senders)] * size
    return sent[0, list(group)] if side == "sent" else sent[:, rank]
