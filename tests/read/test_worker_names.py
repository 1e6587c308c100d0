"""Tests of ranks of a serving engine, known only from the names of their traces: one decision counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny_ranks
from moe_trace.cli import main
from moe_trace.data.errors import TraceFileError
from moe_trace.data.schema import Recording, RoutingSample
from moe_trace.placement.recorded import counts_of_traces
from moe_trace.read.file.worker_names import worker_of
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.text import render_text
from tiny_ranks import LAYERS, Run, held_by, write_rank

STAMP = 1764180000000000000


def _counts(dp: int, layer: int, call: int) -> tuple[int, ...]:
    return (1 + 3 * dp, 2, 3 + layer, 2 + (dp + layer) % 2 + 2 * call)


def _name(dp: int, pp: int, tp: int, tps: int, prefix: str = "") -> str:
    """As vLLM 0.32's `get_worker_rank_suffix` and torch's handler put it together."""
    ep, rank = dp * tps + tp, pp * tps + tp
    return f"{prefix}dp{dp}_pp{pp}_tp{tp}_dcp0_ep{ep}_rank{rank}.{STAMP + ep}.pt.trace.json.gz"


def write_workers(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dp: int = 1,
    tp: int = 1,
    split: bool = False,
    prefix: str = "",
) -> list[Path]:
    """Traces that say nothing of ranks in themselves."""
    known = tiny_ranks.recording_of

    def silent(run: Run, rank: int, samples: Sequence[RoutingSample]) -> Recording:
        held = held_by(rank, run.ranks) if split else None
        made = known(run, rank, samples)
        routers = tuple(replace(router, held_experts=held) for router in made.routers)
        return replace(made, rank=0, world_size=1, parallel=None, routers=routers)

    monkeypatch.setattr(tiny_ranks, "recording_of", silent)
    folder.mkdir()
    run = Run(
        ranks=dp * tp,
        counts=lambda rank, layer, call: _counts(rank // tp, layer, call),
        with_collectives=False,
        suffix=".pt.trace.json.gz",
    )
    return [
        write_rank(folder, run, rank).rename(folder / _name(rank // tp, 0, rank % tp, tp, prefix))
        for rank in range(dp * tp)
    ]


def _expected(engines: int) -> np.ndarray:
    """[L, E] of all calls, each data-parallel engine's tokens once."""
    return np.array(
        [
            np.sum([_counts(dp, layer, call) for dp in range(engines) for call in range(3)], axis=0)
            for layer in range(LAYERS)
        ]
    )


def _loads(summary: TraceSummary) -> np.ndarray:
    return np.array([router.assignments for router in summary.routers])


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("prefix", ["", "run_tp8_", "dp7_"])
def test_ranks_of_an_engine_are_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: int, tp: int, prefix: str
) -> None:
    folder = tmp_path / "vllm"
    write_workers(folder, monkeypatch, dp=dp, tp=tp, prefix=prefix)
    summary = read_summary(folder)
    np.testing.assert_array_equal(_loads(summary), _expected(dp))
    report = summary.ranks
    assert report is not None
    assert report.ranks == tuple(range(dp * tp))
    assert not report.missing
    assert report.token_sets == tuple(tuple(range(d * tp, (d + 1) * tp)) for d in range(dp))
    assert report.mesh == {name: size for name, size in {"dp": dp, "tp": tp}.items() if size > 1}
    counts = counts_of_traces(folder)
    np.testing.assert_array_equal(counts.counts_SLE.sum(axis=0), _expected(dp))


def test_experts_that_ranks_hold_tell_expert_parallelism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each rank computes, by brute force: the slots of its experts, of the tokens of both engines."""
    write_workers(tmp_path / "vllm", monkeypatch, dp=2, tp=2, split=True)
    report = read_summary(tmp_path / "vllm").ranks
    assert report is not None
    assert report.mesh == {"dp": 2, "tp": 2, "ep": 4}
    assert report.exchange == "all_to_all"
    by_layer = _expected(2)
    for layer, found in enumerate(report.layers):
        assert found.load == tuple(by_layer[layer, list(held_by(rank, 4))].sum() for rank in range(4))


def test_a_rank_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_workers(tmp_path / "vllm", monkeypatch, dp=2, tp=2)
    files[2].unlink()
    report = read_summary(tmp_path / "vllm").ranks
    assert report is not None
    assert report.missing == (2,)


def test_a_rank_alone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_workers(tmp_path / "vllm", monkeypatch, tp=2)
    assert read_recording(files[1]).rank == 1
    assert "this is rank 1 alone, of 2" in " ".join(read_summary(files[1]).notes)


def test_what_the_recording_says_of_ranks_is_kept(tmp_path: Path) -> None:
    run = Run(ranks=2, suffix=".pt.trace.json.gz")
    for rank in range(2):
        (tmp_path / "vllm").mkdir(exist_ok=True)
        write_rank(tmp_path / "vllm", run, rank).rename(tmp_path / "vllm" / _name(0, 0, 1 - rank, 2))
    report = read_summary(tmp_path / "vllm").ranks
    assert report is not None
    assert report.mesh == {"ep": 2}
    assert report.token_sets == ((0,), (1,))


def test_ranks_of_older_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_workers(tmp_path / "vllm", monkeypatch, dp=2)
    for rank, file in enumerate(files):
        file.rename(file.with_name(f"vllm-a1b2c-rank-{rank}.{STAMP + rank}.pt.trace.json.gz"))
    summary = read_summary(tmp_path / "vllm")
    assert summary.ranks is not None
    assert summary.ranks.ranks == (0, 1)
    assert any("do not say which ranks route the same tokens" in note for note in summary.ranks.notes)


def test_other_names_are_no_ranks() -> None:
    for name in (
        "host_4711.1764180000000000000.pt.trace.json",
        "ep8.1764180000000000000.pt.trace.json",
        "dp0.1764180000000000000.pt.trace.json",
        "dp0_pp0_tp999999999_dcp0_ep0_rank0.1764180000000000000.pt.trace.json.gz",
        "dp0_pp0_tp1.json",
    ):
        assert worker_of(name) is None, name


def test_a_frontend_beside_the_workers_is_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "vllm"
    write_workers(folder, monkeypatch, tp=2)
    frontend = folder / f"host_4711.async_llm.{STAMP}.pt.trace.json.gz"
    frontend.write_text('{"traceEvents": []}')
    text = render_text(read_summary(folder))
    assert "1 trace beside these is of vLLM's frontend (async_llm)" in " ".join(text.split())
    assert "left out" not in text
    assert main(["check", str(folder)]) == 0
    assert main(["placement", str(folder), "--ranks", "2"]) == 0
    assert main(["diff", str(folder), str(folder)]) == 0
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged.json")]) == 0
    assert main(["reduce", str(folder)]) == 0
    capsys.readouterr()
    with pytest.raises(TraceFileError, match="of vLLM's frontend"):
        read_summary(frontend)
