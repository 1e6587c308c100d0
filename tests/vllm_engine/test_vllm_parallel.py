"""Expert-parallel and data-parallel ranks of vLLM's real engine, on a CPU.

`cpu_expert_parallel.py` replaces what vLLM's CPU build lacks for this.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_trace
from moe_trace.cli import main
from vllm_runs import ENVIRONMENT, PROMPT_TOKENS, EngineRun, Runner, counts_in

pytestmark = pytest.mark.timeout(900)
ASSIGNMENTS = 4 * (PROMPT_TOKENS + 4 * 5)
HELD = {0: tuple(range(8)), 1: tuple(range(8, 16))}


@pytest.fixture(scope="module")
def experts_split(engine_run: Runner) -> EngineRun:
    return engine_run(
        [{"kind": "profile", "oracle": True}, {"kind": "plain"}],
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enforce_eager=True,
        worker_extension_cls="cpu_expert_parallel.ExpertParallelWorker",
    )


def test_counts_of_expert_parallel_ranks_are_vllms_own(experts_split: EngineRun) -> None:
    oracles = experts_split.result["phases"][0]["ranks"]
    assert oracles[0] == oracles[1] and oracles[0]["captured"] == oracles[0]["by_logits"]
    assert {sum(map(sum, calls)) for calls in oracles[0]["captured"].values()} == {ASSIGNMENTS}
    names = sorted(trace.name for trace in experts_split.traces)
    assert [name.partition("_rank")[0] for name in names] == [
        "dp0_pp0_tp0_dcp0_ep0",
        "dp0_pp0_tp1_dcp0_ep1",
    ]
    for trace in experts_split.traces:
        recording = moe_trace.read_recording(trace)
        assert counts_in(trace) == oracles[recording.rank]["captured"]
        assert all(sample.placement is not None for sample in recording.samples)
        assert not any(recording.lost.calls.values())
        assert {router.held_experts for router in recording.routers} == {HELD[recording.rank]}
        assert main(["check", str(trace)]) == 0
    assert experts_split.tokens[0] == experts_split.tokens[1]


def test_ranks_compute_the_slots_of_the_experts_that_they_hold(
    experts_split: EngineRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captured = experts_split.result["phases"][0]["ranks"][0]["captured"]
    folder = str(experts_split.traces[0].parent)
    merged = str(tmp_path / "merged.pt.trace.json.gz")
    assert main(["merge", folder, "--out", merged]) == 0
    for where in (folder, merged):
        capsys.readouterr()
        assert main(["report", where, "--format", "json"]) == 0
        report = json.loads(capsys.readouterr().out)["ranks"]
        assert report["ranks"] == [0, 1]
        for layer in report["layers"]:
            slots = [sum(column) for column in zip(*captured[layer["name"]], strict=True)]
            assert layer["load"] == [sum(slots[expert] for expert in HELD[rank]) for rank in (0, 1)]


@pytest.fixture(scope="module")
def data_split(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data-parallel ranks whose experts are split over both."""
    folder, here = tmp_path_factory.mktemp("data_parallel"), Path(__file__).parent
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{installed}{os.pathsep}{here}"}
    env["VLLM_CACHE_ROOT"] = str(folder / "cache")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    running = []
    for rank in (0, 1):
        spec: dict[str, Any] = {"rank": rank, "port": port, "out": str(folder)}
        command = [sys.executable, str(here / "data_parallel_rank.py"), json.dumps(spec)]
        with (folder / f"said{rank}").open("w") as said:
            running.append(
                subprocess.Popen(command, env=env, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
            )
    for rank, process in enumerate(running):
        said = folder / f"said{rank}"
        assert process.wait(timeout=600) == 0, said.read_text()[-4000:]
    return folder


def test_data_parallel_ranks_are_read_by_their_own_calls(
    data_split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [json.loads((data_split / f"result{rank}.json").read_text()) for rank in (0, 1)]
    traces = sorted((data_split / "traces").glob("*.pt.trace.json*"))
    assert [trace.name.partition("_rank")[0] for trace in traces] == [
        "dp0_pp0_tp0_dcp0_ep0",
        "dp1_pp0_tp0_dcp0_ep1",
    ]
    captured = [result["oracle"]["captured"] for result in results]
    for rank, trace in enumerate(traces):
        recording = moe_trace.read_recording(trace)
        parallel = recording.parallel
        assert (recording.rank, recording.world_size) == (rank, 2) and parallel is not None
        assert parallel.token_ranks == (rank,) and parallel.expert_ranks == (0, 1)
        assert parallel.expert_exchange == "all_to_all"
        assert {router.held_experts for router in recording.routers} == {HELD[rank]}
        assert counts_in(trace) == captured[rank]
        assert not any(recording.lost.calls.values())
        assert main(["check", str(trace)]) == 0
        assert results[rank]["tokens"][0] == results[rank]["tokens"][1]
    capsys.readouterr()
    assert main(["report", str(data_split / "traces"), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)["ranks"]
    for layer in report["layers"]:
        calls = [counts for one in captured for counts in one[layer["name"]]]
        slots = [sum(column) for column in zip(*calls, strict=True)]
        assert layer["load"] == [sum(slots[expert] for expert in HELD[rank]) for rank in (0, 1)]
