"""Tests that what cannot be joined is reported as unknown, never as zero, on damaged real traces."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_trace.read.check import check, read_checked
from moe_trace.read.reader import TraceSummary, read_summary
from paths import ROOT
from spelled import SPELLINGS

TRAIN = ROOT / "tests" / "data" / "h200" / "train_grouped_mm.pt.trace.json.gz"
Event = dict[str, Any]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(gzip.decompress(TRAIN.read_bytes()))
    return trace


@pytest.fixture(scope="module")
def truth() -> TraceSummary:
    return read_summary(TRAIN)


Spoil = Callable[[dict[str, Any], Callable[[Event], "Event | None"]], Path]


@pytest.fixture
def spoil(tmp_path: Path) -> Spoil:
    def written(trace: dict[str, Any], change: Callable[[Event], Event | None]) -> Path:
        events = [changed for e in trace["traceEvents"] if (changed := change(dict(e))) is not None]
        path = tmp_path / "spoiled.pt.trace.json"
        path.write_text(json.dumps({**trace, "traceEvents": events}))
        return path

    return written


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_number_is_the_same_in_any_spelling(
    spelling: str, spoil: Spoil, whole: dict[str, Any], truth: TraceSummary
) -> None:
    read = read_summary(spoil(whole, SPELLINGS[spelling]))
    assert read.phases == truth.phases
    assert read.busy_us == truth.busy_us
    assert not any("joined" in note for note in read.notes)


def losing(every: int, lost: Callable[[Event], bool], instead: Callable[[Event], Event | None]) -> Any:
    count = 0

    def change(event: Event) -> Event | None:
        nonlocal count
        if not lost(event):
            return event
        count += 1
        return instead(event) if count % every == 0 else event

    return change


def is_launch(event: Event) -> bool:
    return event.get("cat") == "cuda_runtime" and "aunchKernel" in event["name"]


def is_kernel(event: Event) -> bool:
    return event.get("cat") == "kernel"


def is_backward(event: Event) -> bool:
    return event.get("cat") == "fwdbwd" and event["ph"] == "f"


@pytest.mark.parametrize("lost", [is_launch, is_kernel], ids=["launches", "kernels"])
def test_a_third_lost_is_unknown_and_said(lost: Any, spoil: Spoil, whole: dict[str, Any]) -> None:
    path = spoil(whole, losing(3, lost, lambda e: {**e, "cat": "x"}))
    read = read_summary(path)
    assert read.phases is not None and read.speed is not None
    total, around = read.phases.total, read.phases.whole
    assert total.device_busy_us is None and total.device_gap_us is None
    assert around.moe_work_us is None and around.moe_share_of_model is None
    assert total.forward["experts"].share_of_moe is None and total.forward["experts"].kernels is None
    assert read.speed.experts.flops_per_s is None
    assert all(r.latency.device_busy is None for r in read.routers)
    assert {cost.verdict for cost in read.imbalance} == {"cannot tell"}
    timed = {"moving_tokens", "router_waits", "launch_gaps", "far_from_peak", "costly_imbalance"}
    assert not timed & {finding.rule for finding in read.findings}
    assert any("launch" in note and "not given" in note for note in read.notes)
    broken = {rule for rule, found in check(read_checked(path)).items() if found}
    assert broken & {"kernels_have_launches", "launches_have_kernels"}


def test_a_few_lost_are_counted_and_the_rest_is_given(
    spoil: Spoil, whole: dict[str, Any], truth: TraceSummary
) -> None:
    read = read_summary(spoil(whole, losing(100, is_launch, lambda e: None)))
    assert read.phases is not None and truth.phases is not None
    assert 0 < read.phases.total.device_busy_us <= truth.phases.total.device_busy_us
    assert read.times is not None and 0.9 <= read.times.coverage.kernels.share < 1
    assert any("have a launch" in note for note in read.notes)


def test_lost_flows_leave_the_backward_unknown(spoil: Spoil, whole: dict[str, Any]) -> None:
    path = spoil(whole, losing(3, is_backward, lambda e: {**e, "id": e["id"] + 10**9}))
    read = read_summary(path)
    assert read.phases is not None and read.phases.total.backward is None
    assert read.phases.total.device_busy_us is not None
    assert read.phases.whole.moe_work_us is None, "forward and backward together"
    assert any("backward" in note for note in read.notes)
    assert check(read_checked(path))["flows_have_both_ends"]


def test_ranges_on_a_lane_of_their_own_are_unknown(spoil: Spoil, whole: dict[str, Any]) -> None:
    path = spoil(whole, lambda e: {**e, "tid": 99} if e.get("cat") == "user_annotation" else e)
    read = read_summary(path)
    assert read.phases is None
    assert any("ranges" in note and "not given" in note for note in read.notes)
    assert check(read_checked(path))["ranges_hold_operators"]


@pytest.mark.parametrize("time", [0, 1.5, "0", 4e14], ids=str)
def test_a_time_of_no_clock_is_counted_and_left_out(
    time: Any, spoil: Spoil, whole: dict[str, Any], truth: TraceSummary
) -> None:
    first = next(e for e in whole["traceEvents"] if is_kernel(e))
    read = read_summary(spoil(whole, lambda e: {**e, "ts": time} if e == first else e))
    assert read.phases is not None and truth.phases is not None
    assert read.phases.total.device_span_us == pytest.approx(truth.phases.total.device_span_us, rel=0.05)
    assert any("1 events" in note for note in read.notes)


def test_missing_times_are_no_zeros(spoil: Spoil, whole: dict[str, Any]) -> None:
    def strip(event: Event) -> Event:
        return {k: v for k, v in event.items() if k != "ts"} if is_kernel(event) else event

    read = read_summary(spoil(whole, strip))
    assert read.phases is not None and read.phases.total.device_busy_us is None
    assert any("could not be read" in note for note in read.notes)


# -- merged by other tools -------------------------------------------------------------------------------


def two_ranks(trace: dict[str, Any], pid: Callable[[int, Any], Any], shift_us: float) -> dict[str, Any]:
    """The trace and a second rank's, as a tool that knows nothing of correlations puts them together."""
    events = []
    for rank in (0, 1):
        for event in trace["traceEvents"]:
            copy = {**event, "pid": pid(rank, event.get("pid"))}
            if rank and "ts" in copy:
                copy["ts"] += shift_us
            events.append(copy)
    return {**trace, "traceEvents": events}


PIDS: dict[str, Callable[[int, Any], Any]] = {
    "one process a rank": lambda rank, pid: rank,
    "ids that go on": lambda rank, pid: pid + 1000 * rank if isinstance(pid, int) else pid,
    "texts": lambda rank, pid: f"rank {rank} {pid}",
}


@pytest.mark.parametrize("pids", PIDS)
@pytest.mark.parametrize("shift_us", [0.0, 500.0, 1e6])
def test_a_file_of_several_ranks_gives_those_of_its_recording_or_none(
    pids: str, shift_us: float, spoil: Spoil, whole: dict[str, Any], truth: TraceSummary
) -> None:
    read = read_summary(spoil(two_ranks(whole, PIDS[pids], shift_us), lambda e: e))
    assert read.phases is not None and truth.phases is not None
    busy = read.phases.total.device_busy_us
    if busy is None:
        assert any("launch" in note for note in read.notes)
    else:
        assert busy == truth.phases.total.device_busy_us
        assert read.phases.whole.moe_share_of_model == truth.phases.whole.moe_share_of_model
    assert any("processes" in note for note in read.notes)
    if pids == "one process a rank" or shift_us == 500.0:
        assert busy is not None, "this can be told"


# -- clocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["missing", "text"])
def test_a_base_that_is_not_written_follows_from_the_calls(base: str, tmp_path: Path) -> None:
    def base_ns(path: Path) -> int:
        return read_summary(path).rank_inputs[0].calls.base_time_ns

    source = ROOT / "tests" / "data" / "gloo_ep2" / "rank0.pt.trace.json.gz"
    trace = json.loads(gzip.decompress(source.read_bytes()))
    written = trace.pop("baseTimeNanoseconds")
    if base == "text":
        trace["baseTimeNanoseconds"] = "two o'clock"
    path = tmp_path / "rank0.pt.trace.json"
    path.write_text(json.dumps(trace))
    assert base_ns(source) == written
    assert written <= base_ns(path) < written + 50_000, "within the time between a range's start and its hook"
    (tmp_path / "rank1.pt.trace.json.gz").write_bytes(source.with_name("rank1.pt.trace.json.gz").read_bytes())
    notes = [note for note in read_summary(tmp_path).notes if "baseTimeNanoseconds" in note]
    assert len(notes) == 1 and notes[0].startswith("the traces of ranks 0 do not say")
