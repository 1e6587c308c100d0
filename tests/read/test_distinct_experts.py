"""Tests of distinct experts per step: the formula against all routings, a report against single calls."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_trace
from moe_trace.cli import main
from moe_trace.data.distinct import uniform_distinct
from moe_trace.data.schema import Parallel, Recording, RouterInfo, RoutingSample
from moe_trace.read.experts.distinct import DistinctExperts, DistinctReport, report_distinct
from moe_trace.read.file.filters import Filter
from moe_trace.read.ranks.loads import RankRecords
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.figures.distinct import distinct_figure
from moe_trace.show.text import render_text
from paths import DATA
from tiny_ranks import Run, held_by, write_ranks
from tiny_trace import EXPERTS, LAYERS, write_tiny

BANDWIDTH = 4.8e12  # an H200's, as the tiny trace says
ON_GPUS = ["h100/prefill_decode_16_layers", "h200/decode_grouped_mm"]


@pytest.mark.parametrize(("experts", "k", "tokens"), [(4, 1, 3), (4, 2, 2), (5, 3, 2), (3, 3, 1), (4, 0, 5)])
def test_uniform_routing_is_the_mean_over_all_routings(experts: int, k: int, tokens: int) -> None:
    sets = list(itertools.combinations(range(experts), k))
    draws = [len(set().union(*draw)) for draw in itertools.product(sets, repeat=tokens)]
    assert float(uniform_distinct(experts, k, tokens)) == pytest.approx(statistics.mean(draws))


def _counts(layer: int, call: int) -> tuple[int, ...]:
    """Steps of 1, 2, ... tokens after the prefill, now more, now less even."""
    if call == 0:
        return (5, 6, 7, 2)
    tokens = 1 + call % 4
    spread = [(tokens, tokens, 0, 0), (tokens, 0, tokens - 1, 1), (1, tokens - 1, tokens, 0)]
    return spread[(call + layer) % 3]


def written(folder: Path, calls: int = 13, **changes: Any) -> TraceSummary:
    return read_summary(write_tiny(folder / "t.pt.trace.json", calls=calls, counts=_counts, **changes))


def report_of(summary: TraceSummary) -> DistinctReport:
    assert summary.distinct is not None
    return summary.distinct


def by_hand(counts: list[tuple[int, ...]]) -> dict[str, float]:
    used = [sum(1 for one in call if one) for call in counts]
    uniform = []
    for call in counts:
        tokens = sum(call) // 2
        uniform.append(EXPERTS * (1 - (1 - 2 / EXPERTS) ** tokens))
    return {
        "calls": len(counts),
        "min": min(used),
        "median": statistics.median(used),
        "max": max(used),
        "mean": statistics.mean(used),
        "uniform": statistics.mean(uniform),
        "experts": EXPERTS,
    }


def same(found: DistinctExperts, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name


def test_each_number_of_tokens_is_that_of_its_calls(tmp_path: Path) -> None:
    report = report_of(written(tmp_path))
    every = [(layer, _counts(layer, call)) for call in range(13) for layer in range(LAYERS)]
    sizes = sorted({sum(call) // 2 for _, call in every})
    assert [size.label for size in report.sizes] == [str(size) for size in sizes]
    for size, found in zip(sizes, report.sizes, strict=True):
        same(found, by_hand([call for _, call in every if sum(call) // 2 == size]))
    for layer, one in enumerate(report.layers):
        for size, found in zip(sizes, one.sizes, strict=True):
            same(found, by_hand([call for at, call in every if at == layer and sum(call) // 2 == size]))


def test_bytes_and_times_of_a_step_add_up_over_layers(tmp_path: Path) -> None:
    """bfloat16 weights of 500 numbers an expert; the experts' products take 10 + 4 + 10 µs a call."""
    report = report_of(written(tmp_path))
    assert report.unknown is None
    for i, found in enumerate(report.sizes):
        of_layers = [one.sizes[i] for one in report.layers]
        assert [one.bytes for one in of_layers] == [pytest.approx(one.mean * 1000) for one in of_layers]
        assert found.bytes == pytest.approx(sum(one.bytes or 0 for one in of_layers))
        assert found.least_us == pytest.approx(1e6 * (found.bytes or 0) / BANDWIDTH)
        assert found.experts_us == pytest.approx(LAYERS * 24)


def test_many_sizes_are_put_together_by_powers_of_two(tmp_path: Path) -> None:
    path = write_tiny(
        tmp_path / "t.pt.trace.json", calls=40, counts=lambda layer, call: (call + 1, call + 1, 0, 0)
    )
    labels = [size.label for size in report_of(read_summary(path)).sizes]
    assert labels == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-40"]


def test_a_prefill_or_a_training_step_alone_has_none(tmp_path: Path) -> None:
    assert written(tmp_path, calls=1).distinct is None
    train = written(tmp_path, change=lambda made: replace(made, stage="train"))
    assert train.distinct is None
    assert "Distinct experts" not in render_text(train)
    assert distinct_figure(None).data == []


def test_stages_that_decode_show_it_and_others_do_not(tmp_path: Path) -> None:
    summary = written(tmp_path)
    assert summary.stages["prefill"].distinct is None
    assert summary.stages["decode"].distinct is summary.distinct
    text = render_text(summary)
    assert text.count("Distinct experts by the tokens of a forward") == 1
    assert "4.8 TB/s" in text


def _mixed(made: RoutingSample) -> RoutingSample:
    """Every third step also prefills: only one assignment of each of the first two experts decodes."""
    if made.call % 3 or made.stage != "decode" or made.tokens < 2:
        return made
    decoding = np.minimum(made.assignments, [1, 1, 0, 0])
    return replace(
        made,
        stage="mixed",
        decode_tokens=1,
        prefill_tokens=made.tokens - 1,
        decode_assignments=decoding,
        prefill_assignments=made.assignments - decoding,
    )


def test_of_decoding_a_mixed_forward_counts_whole(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "t.pt.trace.json", calls=13, counts=_counts, change=_mixed)
    recording = read_recording(path)
    summary = read_summary(path, chosen=Filter(stages=frozenset({"decode"})))
    kept = [one for one in recording.samples if one.stage != "prefill"]
    mixed = [one for one in kept if one.stage == "mixed"]
    report = report_of(summary)
    assert 0 < len(mixed) == report.mixed_calls < len(kept)
    assert sum(size.calls for size in report.sizes) == len(kept)
    for size in report.sizes:
        same(size, by_hand([one.assignments for one in kept if one.tokens == size.tokens_min]))
        assert size.experts_us == pytest.approx(LAYERS * 24)
    assert f"{len(mixed)} of these calls also prefill (mixed)" in render_text(summary).replace("\n", " ")


def _report(routers: tuple[RouterInfo, ...], tmp_path: Path, **changes: Any) -> DistinctReport:
    path = write_tiny(tmp_path / "t.pt.trace.json", calls=13, counts=_counts)
    recording = replace(read_recording(path), routers=routers, **changes)
    times = read_summary(path).times
    assert times is not None
    found = report_distinct(recording, RankRecords(by_rank={0: recording}), times, None)
    assert found is not None
    return found


def _routers(**changes: Any) -> tuple[RouterInfo, ...]:
    return tuple(replace(tiny_trace.router(layer), **changes) for layer in range(LAYERS))


def test_the_recorded_size_of_an_expert_counts_before_the_models_type(tmp_path: Path) -> None:
    report = _report(_routers(expert_bytes=77), tmp_path)
    assert report.sizes[0].bytes == pytest.approx(77 * LAYERS * report.sizes[0].mean)
    assert report.sizes[0].least_us is None


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    model = {"class": "Tiny", "dtype": "int4"}
    report = _report(_routers(), tmp_path, model=model)
    assert report.unknown is not None and "size of an expert" in report.unknown
    assert all(size.bytes is None and size.least_us is None for size in report.sizes)


def test_identity_experts_read_nothing(tmp_path: Path) -> None:
    report = _report(_routers(identity_experts=2), tmp_path)
    for size in report.sizes:
        calls = [_counts(layer, c) for c in range(13) for layer in range(LAYERS)]
        calls = [call[:2] for call in calls if sum(call) // 2 == size.tokens_min]
        assert size.mean == pytest.approx(statistics.mean(sum(1 for n in call if n) for call in calls))
        assert size.experts == 2


def test_experts_that_all_compute_are_all_read(tmp_path: Path) -> None:
    report = _report(_routers(every_expert_computes=True), tmp_path)
    assert {size.bytes for size in report.sizes} == {1000.0 * EXPERTS * LAYERS}


def test_ranks_that_share_their_tokens_read_what_they_hold(tmp_path: Path) -> None:
    """Of the busiest rank: experts 0, 1 on one, 2, 3 on the other, one decision of both."""

    def counts(rank: int, layer: int, call: int) -> tuple[int, ...]:
        return _counts(layer, call)

    run = Run(ranks=2, calls=13, counts=counts, exchange="all_reduce", with_collectives=False)
    write_ranks(tmp_path, run)
    recordings = [read_recording(path) for path in sorted(tmp_path.glob("*.json"))]
    recordings = [
        replace(r, routers=tuple(replace(one, expert_bytes=100) for one in r.routers)) for r in recordings
    ]
    times = read_summary(tmp_path).times
    assert times is not None
    report = report_distinct(recordings[0], RankRecords(by_rank=dict(enumerate(recordings))), times, None)
    assert report is not None
    for size in report.sizes:
        per_layer = []
        for layer in range(LAYERS):
            calls = [_counts(layer, c) for c in range(13)]
            calls = [call for call in calls if sum(call) // 2 == size.tokens_min]
            most = [max(sum(1 for e in held_by(r, 2) if call[e]) for r in range(2)) for call in calls]
            per_layer.append(100 * statistics.mean(most))
        assert size.bytes == pytest.approx(sum(per_layer))


def test_ranks_that_exchange_tokens_tell_no_bytes(tmp_path: Path) -> None:
    write_ranks(tmp_path, Run(ranks=2, calls=4))
    report = report_of(read_summary(tmp_path))
    assert report.unknown is not None and "exchange tokens" in report.unknown
    assert "Bytes read: unknown" in render_text(read_summary(tmp_path))


def test_a_tensor_parallel_rank_of_an_older_file_tells_no_bytes(tmp_path: Path) -> None:
    parallel = Parallel(mesh={"tp": 2}, token_ranks=(0, 1))
    assert _report(_routers(), tmp_path, parallel=parallel, world_size=2).unknown is not None


@pytest.mark.parametrize("name", ON_GPUS)
def test_traces_of_gpus(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the recording's own calls, read as plain numbers."""
    path = DATA / f"{name}.pt.trace.json.gz"
    recording: Recording = read_recording(path)
    decode = [s for s in recording.samples if s.stage == "decode"]
    assert main(["report", str(path), "--format", "json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    (one,) = [size for size in plain["distinct"]["sizes"] if size["tokens_max"] == decode[0].tokens]
    used = [int(np.count_nonzero(s.assignments)) for s in decode]
    assert (one["min"], one["max"], one["calls"]) == (min(used), max(used), len(used))
    router = recording.routers[0]
    layers = len(recording.routers)
    assert one["bytes"] == pytest.approx(statistics.mean(used) * layers * router.expert_flops_per_slot)
    assert one["least_us"] < one["experts_us"]


def test_steps_that_do_little_but_read_are_a_finding() -> None:
    summary = read_summary(DATA / "h200/decode_grouped_mm.pt.trace.json.gz")
    (found,) = [f for f in summary.findings if f.rule == "weights_bind"]
    size = report_of(summary).sizes[0]
    assert found.value == pytest.approx((size.least_us or 0) / (size.experts_us or 1))
    assert found.stage is None and found.value >= found.threshold
