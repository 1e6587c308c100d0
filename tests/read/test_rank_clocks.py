"""Tests of rank clocks: known offsets are found, causality holds afterwards, other cases are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.file.rank_parts import Alignment
from moe_trace.read.file.trace_file import TraceFile, read_trace
from moe_trace.read.ranks.align import align, count_early
from moe_trace.read.ranks.shared_calls import RankCalls, match_calls, rank_calls
from moe_trace.read.reader import read_summary
from tiny_ranks import Run, write_rank, write_ranks

PARTS = ("counts", "dispatch", "combine")


def _calls(trace: TraceFile) -> RankCalls:
    return rank_calls(trace, find_kernels(trace.events))


def calls_of(folder: Path, run: Run) -> list[RankCalls]:
    return [_calls(read_trace(path)) for path in write_ranks(folder, run)]


def aligned(calls: list[RankCalls]) -> Alignment:
    return align(calls, *match_calls(calls))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_known_offsets_are_found_to_the_nanosecond(tmp_path: Path, ranks: int, sequence: bool) -> None:
    run = Run(ranks=ranks, sequence=sequence)
    found = aligned(calls_of(tmp_path, run))
    assert dict(found.offset_ns) == {r: round(1000 * run.offset_us[r]) for r in range(ranks)}
    assert found.after is not None and found.after.max_us == 0
    assert (found.early_after, found.unaligned, found.same_host) == (0, (), False)
    assert found.early_before > 0, "the clocks were so far apart that receives ended before their sends"


def test_the_residual_is_the_noise_that_was_put_in(tmp_path: Path) -> None:
    def late(rank: int, call: int, part: str) -> float:
        return 4.0 if rank == 1 and call == 2 else 0.0  # a third of the collectives ends 4 µs apart

    found = aligned(calls_of(tmp_path, Run(jitter_us=late)))
    assert found.offset_ns[1] == 250_000
    assert found.after is not None
    assert (found.after.median_us, found.after.max_us) == (0.0, 4.0)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offsets=st.lists(st.integers(-5_000_000, 5_000_000), min_size=3, max_size=3),
    noise=st.lists(st.integers(0, 30_000), min_size=36, max_size=36),
)
def test_after_alignment_no_receive_ends_before_its_send(
    tmp_path: Path, offsets: list[int], noise: list[int]
) -> None:
    """However the clocks stand and the ranks end: an offset that keeps causality exists."""
    run = Run(
        ranks=4,
        offset_us=(0.0, *(o / 1000 for o in offsets)),
        jitter_us=lambda rank, call, part: noise[9 * rank + 3 * call + PARTS.index(part)] / 1000,
    )
    calls = calls_of(tmp_path, run)
    matched, _ = match_calls(calls)
    found = align(calls, matched)
    assert found.early_after == 0
    assert count_early(matched, found.offset_ns) == 0
    for rank in (1, 2, 3):
        assert abs(found.offset_ns[rank] - offsets[rank - 1]) <= 60_000


def test_ranks_of_one_host_keep_their_clock(tmp_path: Path) -> None:
    def late(rank: int, call: int, part: str) -> float:
        return 3.0 * rank  # would be taken for an offset, were the clocks not one

    run = Run(offset_us=(0, 0), hosts=("a", "a"), jitter_us=late)
    found = aligned(calls_of(tmp_path, run))
    assert dict(found.offset_ns) == {0: 0, 1: 0}
    assert found.same_host
    assert found.after is not None and found.after.median_us == 3.0


def test_one_name_of_two_hosts_is_not_believed(tmp_path: Path) -> None:
    found = aligned(calls_of(tmp_path, Run(hosts=("localhost", "localhost"))))
    assert found.offset_ns[1] == 250_000
    assert not found.same_host


def test_other_runs_of_one_host_are_not_matched(tmp_path: Path) -> None:
    calls = calls_of(tmp_path, Run(hosts=("a", "a"), offset_us=(0, 123e6)))
    matched, refused = match_calls(calls)
    assert matched == []
    assert refused and all("began its first" in line and "123" in line for line in refused)


def test_ranks_of_a_host_move_together(tmp_path: Path) -> None:
    run = Run(ranks=4, offset_us=(0, 0, 900, 900), hosts=("a", "a", "b", "b"))
    found = aligned(calls_of(tmp_path, run))
    assert list(found.offset_ns.values()) == [0, 0, 900_000, 900_000]


def test_without_shared_collectives_the_clocks_stay_and_it_is_said(tmp_path: Path) -> None:
    write_ranks(tmp_path, Run(with_collectives=False))
    report = read_summary(tmp_path).ranks
    assert report is not None
    assert report.alignment.unaligned == (1,)
    assert dict(report.alignment.offset_ns) == {0: 0, 1: 0}
    assert report.wait_us is None
    assert any("could not be aligned" in note for note in read_summary(tmp_path).notes)


def test_groups_that_share_nothing_are_aligned_each_on_its_own(tmp_path: Path) -> None:
    """Two expert groups: ranks 2 and 3 cannot be put on rank 0's clock, but on one with each other."""

    def in_pairs(one: RankCalls) -> RankCalls:
        group = ((0, 1), (2, 3))[one.rank // 2]
        moved = (replace(c, facts=replace(c.facts, group=group)) for c in one.collectives)
        return replace(one, collectives=tuple(moved))

    found = aligned([in_pairs(one) for one in calls_of(tmp_path, Run(ranks=4))])
    assert found.unaligned == (2, 3)
    assert dict(found.offset_ns) == {0: 0, 1: 250_000, 2: 0, 3: 47_500}
    assert found.early_after == 0
    assert "ranks 2, 3 could not be aligned with that of rank 0" in found.notes[0]


def test_different_numbers_of_calls_are_refused(tmp_path: Path) -> None:
    for rank, calls in ((0, 3), (1, 2)):
        write_rank(tmp_path, Run(calls=calls), rank)
    calls = [_calls(read_trace(path)) for path in sorted(tmp_path.glob("*.json"))]
    matched, refused = match_calls(calls)
    assert matched == []
    assert "rank 0: 18, rank 1: 12" in refused[0]
    assert aligned(calls).unaligned == (1,)


def test_sequence_numbers_match_what_both_recorded(tmp_path: Path) -> None:
    for rank, calls in ((0, 3), (1, 2)):
        write_rank(tmp_path, Run(calls=calls, sequence=True), rank)
    calls = [_calls(read_trace(path)) for path in sorted(tmp_path.glob("*.json"))]
    (shared,), refused = match_calls(calls)
    assert (len(shared.calls), refused) == (12, [])
    assert aligned(calls).offset_ns[1] == 250_000


def test_an_empty_part_bounds_nothing(tmp_path: Path) -> None:
    """A rank that sends nothing to another may begin after that one's end."""

    def counts(rank: int, layer: int, call: int) -> tuple[int, ...]:
        return (2, 2, 0, 0)  # all to rank 0

    calls = calls_of(tmp_path, Run(counts=counts, offset_us=(0, 0)))
    matched, _ = match_calls(calls)
    (shared,) = matched
    parts = shared.sends
    assert parts.shape == (18, 2, 2)
    dispatch = [i for i, row in enumerate(shared.calls) if row[0].role == "dispatch"]
    assert parts[dispatch, 1, 0].all() and not parts[dispatch, 0, 1].any()
    assert not parts[:, range(2), range(2)].any()


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t + 1_000_000_000_000])
def test_base_times_do_not_matter(tmp_path: Path, change: Callable[[int], int]) -> None:
    run = Run(base_ns=(Run().base_ns[0], change(Run().base_ns[0])))
    assert aligned(calls_of(tmp_path, run)).offset_ns[1] == 250_000


def test_offsets_follow_the_median_not_the_mean(tmp_path: Path) -> None:
    def late(rank: int, call: int, part: str) -> float:
        return 500.0 if rank == 1 and call == 0 and part == "counts" else 0.0

    found = aligned(calls_of(tmp_path, Run(jitter_us=late)))
    assert found.offset_ns[1] == 250_000
    assert found.after is not None
    assert np.isclose(found.after.max_us, 500.0)
