"""Tests of the report on several ranks, against results by hand from hand-made traces."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_trace.cli import main
from moe_trace.data.codec import decode_recording, encode_recording
from moe_trace.data.errors import SchemaError, TraceFileError
from moe_trace.data.schema import RoutingSample
from moe_trace.placement.recorded import counts_of_traces
from moe_trace.read.ranks.report import RankReport
from moe_trace.read.reader import Filter, TraceSummary, read_recording, read_summary
from moe_trace.show.json import to_plain
from moe_trace.show.text import render_text
from paths import DATA
from tiny_ranks import LAYERS, SLOT_BYTES, Run, counts_array, sent, write_rank, write_ranks
from tiny_trace import write_tiny


def report_of(summary: TraceSummary) -> RankReport:
    assert summary.ranks is not None
    return summary.ranks


@pytest.fixture(scope="module", params=[2, 4])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, TraceSummary]:
    run = Run(ranks=request.param)
    folder = tmp_path_factory.mktemp("ranks")
    write_ranks(folder, run)
    return run, read_summary(folder)


def test_matrices_equal_brute_force(case: tuple[Run, TraceSummary]) -> None:
    run, summary = case
    for layer, found in enumerate(report_of(summary).layers):
        expected = [
            [sum(sent(run, r, to, layer, call) for call in range(run.calls)) for to in range(run.ranks)]
            for r in range(run.ranks)
        ]
        assert found.sent == tuple(map(tuple, expected))
        assert found.load == tuple(np.sum(expected, axis=0).tolist())
        assert np.sum(found.sent) == sum(counts_array(run, r, layer).sum() for r in range(run.ranks))
        load = np.array(found.load)
        assert found.max_over_mean == pytest.approx(load.max() / load.mean())
        assert found.hot_rank == int(load.argmax())


def test_the_hot_expert_is_the_busiest_of_the_hot_rank(case: tuple[Run, TraceSummary]) -> None:
    run, summary = case
    for layer, found in enumerate(report_of(summary).layers):
        per_expert = np.sum([counts_array(run, r, layer) for r in range(run.ranks)], axis=0)
        each = len(per_expert) // run.ranks
        mine = per_expert[found.hot_rank * each : (found.hot_rank + 1) * each]  # type: ignore[operator]
        assert found.hot_expert == found.hot_rank * each + int(mine.argmax())  # type: ignore[operator]
        assert found.hot_expert_share == pytest.approx(mine.max() / mine.sum())


def test_waits_are_those_of_the_true_arrivals(case: tuple[Run, TraceSummary]) -> None:
    """Rank r waits 3 (R - 1 - r) µs in a dispatch, 10 (R - 1 - r) in a combine, whatever its clock shows."""
    run, summary = case
    report, last = report_of(summary), run.ranks - 1
    for one in report.exchanges:
        each = {"counts": 0, "dispatch": 3, "combine": 10}[one.part]
        assert one.calls == run.calls
        assert one.wait_us == pytest.approx(run.calls * each * (last - one.rank))
        assert one.on_device
    a_call = 13 * sum(range(run.ranks))
    assert report.wait_us == pytest.approx(a_call * run.calls * LAYERS)
    assert report.waited_for_us == {
        r: pytest.approx(report.wait_us if r == last else 0) for r in report.ranks
    }
    assert {layer.waited_for for layer in report.layers} == {last}
    assert report.wait_share == pytest.approx(report.wait_us / (run.calls * 5000 * run.ranks))
    for step in report.steps:
        assert step.wait_us == pytest.approx(a_call * LAYERS)
        assert step.share == pytest.approx(a_call * LAYERS / (5000 * run.ranks))


def test_steps_add_up_layer_by_layer(case: tuple[Run, TraceSummary]) -> None:
    run, summary = case
    for step in report_of(summary).steps:
        loads = [
            [sum(sent(run, r, to, layer, step.step) for r in range(run.ranks)) for to in range(run.ranks)]
            for layer in range(LAYERS)
        ]
        assert step.load == tuple(np.sum(loads, axis=0).tolist())
        assert step.imbalance == pytest.approx(np.max(loads, axis=1).sum() / np.mean(loads, axis=1).sum())


def test_bytes_bandwidth_and_calls(case: tuple[Run, TraceSummary]) -> None:
    run, summary = case
    for one in report_of(summary).exchanges:
        layer = int(one.site[1:])
        pairs = [(one.rank, to) if one.part == "dispatch" else (to, one.rank) for to in range(run.ranks)]
        slots = [sum(sent(run, a, b, layer, c) for c in range(run.calls)) for a, b in pairs]
        if one.part == "counts":
            assert one.bytes_in == run.calls * 4 * 8
            continue
        assert one.bytes_in == SLOT_BYTES * sum(slots)
        assert one.bytes_leaving == SLOT_BYTES * (sum(slots) - slots[one.rank])
        moving_us = {"dispatch": 15 - 3 * (run.ranks - 1), "combine": 43 - 10 * (run.ranks - 1)}[one.part]
        assert one.time_us - (one.wait_us or 0) == pytest.approx(run.calls * moving_us)
        assert one.gb_per_s == pytest.approx(one.bytes_leaving / (run.calls * moving_us) / 1000)


def test_bytes_equal_the_counts_in_both_directions(case: tuple[Run, TraceSummary]) -> None:
    run, summary = case
    check = report_of(summary).bytes_check
    assert (check.equal, check.different, check.unknown) == (2 * 2 * run.ranks * run.calls * LAYERS, 0, 0)
    assert "bytes_differ" not in {finding.rule for finding in summary.findings}


@pytest.mark.parametrize("part", ["dispatch", "combine"])
def test_one_slot_too_many_is_found(tmp_path: Path, part: str) -> None:
    def change(rank: int, layer: int, call: int, of: str, split: list[int]) -> list[int]:
        if (rank, layer, call, of) == (1, 1, 2, part):
            split[0] += 1
        return split

    write_ranks(tmp_path, Run(change_split=change))
    summary = read_summary(tmp_path)
    check = report_of(summary).bytes_check
    assert (check.equal, check.different) == (46, 2)  # what goes in and what comes out of that one call
    for wrong in check.mismatches:
        assert (wrong.site, wrong.step, wrong.rank, wrong.part, wrong.peer) == ("L01", 2, 1, part, 0)
        assert wrong.found_bytes - wrong.expected_bytes == SLOT_BYTES
    (finding,) = (f for f in summary.findings if f.rule == "bytes_differ")
    assert "2 of 48 compared all-to-alls" in finding.sentence


def test_counts_of_ranks_with_their_own_tokens_are_added(case: tuple[Run, TraceSummary]) -> None:
    run, summary = case
    for layer, router in enumerate(summary.routers):
        assert (
            list(router.assignments)
            == np.sum([counts_array(run, r, layer) for r in range(run.ranks)], axis=0).tolist()
        )


def test_ranks_that_route_the_same_tokens_count_once(tmp_path: Path) -> None:
    run = Run(exchange="all_reduce", with_collectives=False, counts=lambda rank, layer, call: (1, 2, 3, 4))
    write_ranks(tmp_path, run)
    summary = read_summary(tmp_path)
    report = report_of(summary)
    assert report.token_sets == ((0, 1),)
    for router in summary.routers:
        assert router.assignments == (3, 6, 9, 12)
    for layer in report.layers:
        assert layer.load == (9, 21), "each rank computes the slots of the experts that it holds"
        assert layer.sent is None
    assert "count once" in render_text(summary)


def test_a_forward_that_dispatches_nothing_is_computed_where_the_experts_are(tmp_path: Path) -> None:
    """`auto` may reduce in one forward and exchange in the next: the first call here sends nothing."""

    def change(rank: int, made: RoutingSample) -> RoutingSample:
        return replace(made, dispatched=np.zeros(4, np.int64)) if made.call == 0 else made

    run = Run(change_sample=change, with_collectives=False, counts=lambda rank, layer, call: (1, 2, 3, 4))
    write_ranks(tmp_path, run)
    for layer in report_of(read_summary(tmp_path)).layers:
        assert layer.load == (3 + 2 * 6, 7 + 2 * 14)
        assert layer.sent == ((2 * 3, 2 * 7), (2 * 3, 2 * 7))


def test_ranks_that_dispatch_slices_of_their_tokens(tmp_path: Path) -> None:
    def change(rank: int, made: RoutingSample) -> RoutingSample:
        mine = np.array([(4, 0, 0, 2), (0, 2, 4, 2)][rank], np.int64)
        return replace(made, assignments=np.array([4, 2, 4, 4]), dispatched=mine)

    write_ranks(tmp_path, Run(change_sample=change, with_collectives=False, calls=1))
    for layer in report_of(read_summary(tmp_path)).layers:
        assert layer.sent == ((4, 2), (2, 6))
        assert layer.load == (6, 8)


def test_slots_that_may_or_may_not_travel_are_not_compared(tmp_path: Path) -> None:
    """A slot of weight 0 is skipped by the count and computed by its expert: what moves is not known."""

    def change(rank: int, made: RoutingSample) -> RoutingSample:
        return replace(made, computed_slots=made.computed_slots + 1) if (rank, made.call) == (0, 1) else made

    write_ranks(tmp_path, Run(change_sample=change))
    check = report_of(read_summary(tmp_path)).bytes_check
    assert (check.equal, check.different, check.unknown) == (32, 0, 16)


def test_where_no_product_is_seen_the_last_exchange_is_the_combine() -> None:
    """Events of this run were cut to ranges and collectives: only their order tells dispatch from combine."""
    report = report_of(read_summary(DATA / "gloo_ep2"))
    assert (report.bytes_check.equal, report.bytes_check.different) == (256, 0)
    assert {time.part for time in report.exchanges} == {"counts", "dispatch", "combine"}


def test_without_expert_parallelism_each_rank_computes_its_own_tokens(tmp_path: Path) -> None:
    run = Run(exchange=None, with_collectives=False)
    write_ranks(tmp_path, run)
    for layer, found in enumerate(report_of(read_summary(tmp_path)).layers):
        assert found.load == tuple(int(counts_array(run, r, layer).sum()) for r in range(2))


def test_a_missing_rank_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    run = Run(ranks=4)
    write_ranks(tmp_path, run, ranks=(0, 1, 3))
    summary = read_summary(tmp_path)
    report = report_of(summary)
    assert (report.ranks, report.missing, report.world_size) == ((0, 1, 3), (2,), 4)
    assert any("rank 2" in note and "1 of 4 ranks" in note for note in summary.notes)
    for layer, found in enumerate(report.layers):
        assert found.sent is not None
        assert found.sent[0] == tuple(
            sum(sent(run, 0, to, layer, call) for call in range(run.calls)) for to in range(4)
        ), "what went to the missing rank is known: the experts that no other holds"
    assert report.alignment.offset_ns[3] == 7_500
    assert report.bytes_check.different == 0 and report.bytes_check.unknown > 0


def test_a_broken_rank_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, Run(ranks=4))
    paths[2].write_bytes(paths[2].read_bytes()[:5000])
    summary = read_summary(tmp_path)
    assert report_of(summary).ranks == (0, 1, 3)
    assert any("rank2" in note and "truncated" in note for note in summary.notes)


def test_another_schema_is_refused_even_among_ranks(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, Run())
    paths[1].write_bytes(paths[1].read_bytes().replace(b'"schema_version":1', b'"schema_version":9'))
    with pytest.raises(SchemaError, match="version 9"):
        read_summary(tmp_path)


def test_different_models_are_refused(tmp_path: Path) -> None:
    write_rank(tmp_path, Run(), 0)
    write_tiny(tmp_path / "other.pt.trace.json", sites=("A", "B"))
    with pytest.raises(TraceFileError, match="different models"):
        read_summary(tmp_path)


def test_a_trace_beside_its_copy_counts_once(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, Run())
    alone = read_summary(tmp_path)
    packed = paths[1].with_name("unpacked-and-packed.pt.trace.json.gz")
    packed.write_bytes(gzip.compress(paths[1].read_bytes()))
    both = read_summary(tmp_path)
    assert [r.assignments for r in both.routers] == [r.assignments for r in alone.routers]
    assert report_of(both).layers == report_of(alone).layers
    assert any(packed.name in note and "same calls" in note for note in both.notes)
    counts, of_both = (counts_of_traces(path).counts_SLE for path in (paths[1], tmp_path))
    assert of_both.sum() == sum(counts_of_traces(path).counts_SLE.sum() for path in paths) > counts.sum()


@pytest.mark.parametrize(
    "change",
    [
        {"rank": -3},
        {"rank": 10**9},
        {"world_size": 10**9},
        {"expert_ranks": (1, 5)},
        {"expert_ranks": (0,)},
        {"token_ranks": (1, 1)},
    ],
)
def test_impossible_ranks_are_refused_in_words(tmp_path: Path, change: dict[str, Any]) -> None:
    paths = write_ranks(tmp_path, Run())
    recording = read_recording(paths[1])
    assert recording.parallel is not None
    groups = {name: value for name, value in change.items() if name.endswith("ranks")}
    others = {name: value for name, value in change.items() if name not in groups}
    changed = replace(recording, parallel=replace(recording.parallel, **groups), **others)
    with pytest.raises(TraceFileError, match="changed after it was written"):
        decode_recording(json.loads(encode_recording(changed)))


def test_different_models_are_refused_by_their_width(tmp_path: Path) -> None:
    write_rank(tmp_path, Run(), 0)
    write_rank(tmp_path, Run(model={**Run().model, "hidden_size": 16}), 1)
    with pytest.raises(TraceFileError, match=r"rank0.* and .*rank1.*different models: hidden_size 8 and 16"):
        read_summary(tmp_path)


def test_filters_choose_layers_and_steps(tmp_path: Path) -> None:
    run = Run()
    write_ranks(tmp_path, run)
    report = report_of(read_summary(tmp_path, chosen=Filter(layers=frozenset({"1"}), steps=frozenset({2}))))
    (layer,) = report.layers
    assert layer.load == tuple(sum(sent(run, r, to, 1, 2) for r in range(2)) for to in range(2))
    assert [step.step for step in report.steps] == [2]
    assert report.wait_us == pytest.approx(13)
    assert report.alignment.offset_ns[1] == 250_000, "the clocks are aligned by all that is shared"


def test_one_rank_says_nothing_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rank(tmp_path, Run(), 0)
    summary = read_summary(path)
    assert summary.ranks is None
    assert "ranks" not in to_plain(summary)
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Ranks" not in printed
    assert "rank 0 alone, of 2" in printed


def test_the_report_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranks(tmp_path, Run())
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "rank 1 +250.000 µs" in text and "Assignments sent, over all layers" in text
    assert max(map(len, text[text.index("\nRanks\n") :].splitlines())) <= 80
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    plain: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plain["ranks"]["alignment"]["offset_ns"] == {"0": 0, "1": 250_000}
    assert plain["ranks"]["bytes_check"]["equal"] == 48
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--html", str(page)]) == 0
    html = page.read_text("utf-8")
    assert "All-to-all bytes equal what the counts say in 48 of 48 comparisons" in html
    assert "Assignments sent from rank to rank" in html


def test_findings_name_the_rank_and_the_expert(tmp_path: Path) -> None:
    def counts(rank: int, layer: int, call: int) -> tuple[int, ...]:
        return (2, 2, 2, 40) if layer == 1 else (10, 10, 10, 10)

    write_ranks(tmp_path, Run(counts=counts))
    found = [f for f in read_summary(tmp_path).findings if f.rule == "hot_rank"]
    assert {(f.stage, f.sites) for f in found} == {("prefill", ("L01",)), ("decode", ("L01",))}
    assert found[0].value == pytest.approx(42 / 23)
    assert "rank 1 computes 1.83×" in found[0].sentence and "expert, 3, takes 95 %" in found[0].sentence


def test_waiting_is_a_finding_where_it_is_a_part_of_the_time(tmp_path: Path) -> None:
    write_ranks(tmp_path, Run())
    summary = read_summary(tmp_path)
    assert "waiting_ranks" not in {f.rule for f in summary.findings}  # 0.3 % of the steps
    report = report_of(summary)
    from moe_trace.read.findings.ranks import waiting_ranks

    (finding,) = waiting_ranks(replace(summary, ranks=replace(report, wait_share=0.2)))
    assert "20 % of their time" in finding.sentence and "100 % of it for rank 1" in finding.sentence


def test_what_torch_and_nccl_really_write() -> None:
    """A block's collectives from an H100 (torch 2.11, NCCL 2.28, one rank), beside their kernels by hand."""
    from moe_trace.data.trace_json.events import EventTableBuilder
    from moe_trace.data.trace_json.kernels import find_kernels
    from moe_trace.read.file.opening import open_trace_stream
    from moe_trace.read.ranks.collective_times import find_collectives, split_bytes

    builder = EventTableBuilder()
    with open_trace_stream(DATA / "nccl_collectives.json") as stream:
        for key in stream.walk():
            builder.read(stream) if key == "traceEvents" else stream.skip()
    events = builder.build()
    found = find_collectives((), events, find_kernels(events))
    kinds = ["all_to_all"] * 3 + ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    assert [c.facts.kind for c in found] == [*kinds, "broadcast", "barrier"], "waits are no collectives"
    counts, dispatch, combine = found[:3]
    assert (counts.facts.is_integer, counts.facts.split_in, counts.bytes_in) == (True, (), 64)
    for hidden in (dispatch, combine):
        assert hidden.facts.group == (0,)
        assert hidden.bytes_in == 1024 * 256 * 2  # bfloat16
        assert split_bytes(hidden, "in", 1) == split_bytes(hidden, "out", 1) == [1024 * 256 * 2]
        assert hidden.on_device
    raw = json.loads((DATA / "nccl_collectives.json").read_text())["traceEvents"]
    kernels = [e for e in raw if e["name"].startswith("ncclDevKernel")]
    with_kernels = [dispatch, combine, found[6]]
    assert [c.work_ns for c in with_kernels] == [
        (round(1000 * k["ts"]), round(1000 * k["ts"]) + round(1000 * k["dur"])) for k in kernels
    ]
    assert counts.work_ns is not None, "of one rank NCCL makes a copy instead of a kernel"
    assert found[3].work_ns is None


@pytest.mark.parametrize(("calls", "lost", "given"), [(20, 1, True), (20, 3, False)])
def test_collectives_without_kernels_have_no_time(tmp_path: Path, calls: int, lost: int, given: bool) -> None:
    """Lost are the first kernels of rank 1; what waits is told by the other calls, each with its own."""
    paths = write_ranks(tmp_path / "a", Run(calls=calls))
    whole = report_of(read_summary(tmp_path / "a"))
    trace = json.loads(paths[1].read_text())
    kernels = [e for e in trace["traceEvents"] if str(e.get("name", "")).startswith("nccl")]
    of_a_call = len(kernels) // calls
    gone = {id(event) for event in sorted(kernels, key=lambda e: e["ts"])[: lost * of_a_call]}
    trace["traceEvents"] = [e for e in trace["traceEvents"] if id(e) not in gone]
    paths[1].write_text(json.dumps(trace))
    summary = read_summary(tmp_path / "a")
    report = report_of(summary)
    for before, after in zip(whole.exchanges, report.exchanges, strict=True):
        assert (before.timed, after.timed) == (calls, calls - (lost if after.rank == 1 else 0))
        if after.rank == 0:
            assert after.time_us == before.time_us
        elif given:
            assert after.time_us == pytest.approx(before.time_us * (calls - lost) / calls)
        else:
            assert after.time_us is None
        assert after.wait_us is None
    assert report.wait_us == pytest.approx(whole.wait_us * (calls - lost) / calls)  # type: ignore[operator]
    assert not any("cannot be matched" in note for note in report.notes)
    share = round(100 * (1 - lost / calls / 2))
    assert any(f"{share} % of the" in note and "collectives of MoE layers" in note for note in summary.notes)
    assert "time ms" in render_text(summary)
