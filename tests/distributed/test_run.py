"""Tests of `torchrun -m moe_trace run`: one summary of all ranks, which names ranks without output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.launching import TESTS, environment, torchrun, transformers_splits_experts
from model_config import CONFIG
from moe_trace import read_routes
from moe_trace.data.errors import UsageError
from moe_trace.data.schema import Recording
from moe_trace.integrations.handler import tensorboard_trace_handler
from moe_trace.read.file.folder import find_traces
from moe_trace.read.reader import read_recording
from moe_trace.workload import runner
from moe_trace.workload.config import RunConfig, Split
from moe_trace.workload.models import ModelError
from moe_trace.workload.process_group import RankFailed, Worker, joined, missing_files

SMALL = ("--steps", 1, "--warmup", 0, "--batch", 2, "--seq-len", 12)
SPLIT = ("--fsdp", 2, "--ep", 2, "--ep-implementation", "all_to_all")

pytestmark = pytest.mark.skipif(
    not transformers_splits_experts(), reason="this transformers splits no experts"
)


def recordings(folder: Path) -> list[Recording]:
    found = [read_recording(path) for path in find_traces(folder)]
    return sorted(found, key=lambda recording: recording.rank)


def counts(recording: Recording) -> list[list[int]]:
    return [sample.assignments.tolist() for sample in recording.samples]


@pytest.fixture(scope="module")
def split_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("split") / "run"
    return out, torchrun(
        2, "-m", "moe_trace", "run", "--model", "demo", *SMALL, *SPLIT, "--routes", "--out", out
    )


def moe_trace(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(**variables))


def test_each_rank_writes_the_routes_of_its_own_tokens(
    split_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = split_run
    found = {routes.rank: routes for routes in map(read_routes, out.glob("*.routes.npz"))}
    for recording in recordings(out):
        routes = found[recording.rank]
        assert recording.routes is not None and (out / recording.routes).exists()
        assert routes.world_size == 2 and len(routes) == 12 and routes.dropped == {}
        sums = np.zeros_like(routes.assignments())
        for sample in recording.samples:
            sums[routes.layers.index(sample.name)] += sample.assignments
        assert (routes.assignments() == sums).all() and sums.sum() > 0
    assert not np.array_equal(found[0].expert_ids, found[1].expert_ids), "each has its part of the batch"


def test_ranks_together_say_what_a_single_process_says(
    split_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, done = split_run
    assert done.returncode == 0, done.stderr
    alone = moe_trace("run", "--model", "demo", *SMALL, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    (expected,) = recordings(tmp_path / "alone")
    first, second = recordings(folder)
    assert [first.rank, second.rank] == [0, 1]
    assert (np.array(counts(first)) + counts(second)).tolist() == counts(expected)
    assert first.model["name"] == expected.model["name"] == "demo"
    assert first.model["num_parameters"] == expected.model["num_parameters"]


def test_one_summary_is_printed_by_rank_0(split_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = split_run
    assert done.stdout.count("Load of the experts") == 1
    assert done.stdout.count(f"moe-trace report {folder}") == 1
    assert "moe-trace: error" not in done.stderr
    for rank in (0, 1):
        assert re.search(rf"\.rank{rank}\.\d+\.pt\.trace\.json\.gz", done.stdout)
    calls = re.search(r"(\d+) calls", done.stdout)
    assert calls is not None
    assert int(calls[1]) == 8  # 4 layers, 2 ranks with tokens of their own


def test_the_report_reads_the_folder(split_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    done = moe_trace("report", split_run[0], "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["tokens"] == 4 * 2 * 12


def test_a_folder_that_is_not_empty_is_refused_by_rank_0_alone(
    split_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = split_run
    before = sorted(folder.iterdir())
    done = torchrun(2, "-m", "moe_trace", "run", "--model", "demo", *SMALL, *SPLIT, "--out", folder)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.findall(r"moe-trace: error: .*", done.stderr) == [
        f"moe-trace: error: {folder} exists and is not empty; add --force to replace the run in it, "
        "or choose another folder with --out"
    ]
    assert sorted(folder.iterdir()) == before


def faulty(fault: str, out: Path) -> subprocess.CompletedProcess[str]:
    script = TESTS / "distributed" / "faulty_run.py"
    split = ("--fsdp", 2, "--ep", 2, "--rank-timeout", 4)
    return torchrun(2, script, fault, "run", "--model", "demo", *SMALL, *split, "--out", out)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("die", r"rank 1 has written no trace within [\d.]+ s of rank 0"),
        ("fail", r"the run did not end: rank 1 failed: OlmoeForCausalLM failed .* out of memory"),
    ],
)
def test_a_rank_that_ends_early_is_named_and_the_rest_is_kept(fault: str, said: str, tmp_path: Path) -> None:
    done = faulty(fault, tmp_path / "run")
    assert done.returncode != 0
    assert re.search(f"moe-trace: error: .*{said}", done.stderr), done.stderr
    assert "Load of the experts" not in done.stdout
    (kept,) = (tmp_path / "run").glob("*.rank0.*.pt.trace.json.gz")
    assert kept.name in done.stderr
    assert not list((tmp_path / "run").glob(".moe_trace-*")), "something half-written is left"


@pytest.mark.parametrize("fails", [False, True])
def test_torchruns_signal_does_not_break_off_the_writing(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a rank dies, the signal comes whenever it comes: here when the writing of the trace begins."""
    worker, out = Worker(), tmp_path / "run"
    before = signal.signal(signal.SIGTERM, worker.stop)

    def handler(*arguments: Any, **options: Any) -> Callable[[Any], None]:
        write = tensorboard_trace_handler(*arguments, **options)

        def signalled(prof: Any) -> None:
            signal.raise_signal(signal.SIGTERM)
            write(prof)

        return signalled

    def fail() -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(runner, "tensorboard_trace_handler", handler)
    if fails:
        make_step = runner.make_step
        monkeypatch.setattr(runner, "make_step", lambda *a, **k: make_step(*a, **k) and fail)
    config = RunConfig(out=out, steps=1, warmup=0, batch=1, seq_len=8)
    try:
        with pytest.raises(ModelError, match="closed by peer") if fails else nullcontext():
            runner._record(config, worker, torch.device("cpu"), lambda what, done, total: None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert worker.stop.asked
    assert len(list(out.glob("*.pt.trace.json.gz"))) == 1


@pytest.mark.parametrize("fault", ["late", "lose"])
def test_a_rank_without_a_file_is_named_beside_the_others_figures(fault: str, tmp_path: Path) -> None:
    done = faulty(fault, tmp_path / "run")
    assert done.returncode != 0
    said = {"late": "rank 1 has written no trace within 4 s", "lose": "rank 1 wrote .*, which is not in"}
    assert re.search(f"moe-trace: error: .*{said[fault]}", done.stderr), done.stderr
    assert done.stdout.count("Load of the experts") == 1


def test_experts_that_cannot_be_dealt_out_evenly(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"num_experts": 7}))
    options = ("--random-weights", "--fsdp", 2, "--ep", 2, "--out", tmp_path / "run")
    done = torchrun(2, "-m", "moe_trace", "run", "--model", path, *options)
    assert done.returncode != 0
    assert "Cannot evenly shard 7 experts across 2 expert-parallel ranks" in done.stderr
    assert not list((tmp_path / "run").glob("*"))


def test_random_weights_are_those_of_the_single_process(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    run = ("run", "--model", path, "--random-weights", *SMALL)
    split = torchrun(2, "-m", "moe_trace", *run, "--tp", 2, "--ep", 2, "--out", tmp_path / "split")
    assert split.returncode == 0, split.stderr
    alone = moe_trace(*run, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    (expected,) = recordings(tmp_path / "alone")
    for recording in recordings(tmp_path / "split"):
        assert counts(recording) == counts(expected)
        assert recording.model["name"] == expected.model["name"]


def test_the_commands_of_the_guide_run(tmp_path: Path) -> None:
    text = (TESTS.parent / "docs" / "many_gpus.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    variables = environment(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = ["bash", "-euo", "pipefail", "-c", "".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "(0, 1, 2, 3, 4, 5, 6, 7)" in done.stdout
    assert len(list((tmp_path / "runs" / "train").glob("*.rank*.pt.trace.json.gz"))) == 2


def test_the_benchmark_runs_and_counts_no_collective_more() -> None:
    script = TESTS.parent / "scripts" / "bench_ranks.py"
    done = torchrun(2, script, "--pairs", 2, "--repeat", 1, "--length", 16)
    assert done.returncode == 0, done.stderr
    row = done.stdout.strip().splitlines()[-1].strip("| ").split(" | ")
    assert row[-2] == row[-1]
    assert int(row[-1]) > 0


# -- what is refused at once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--fsdp", 2, "--ep", 2), "torchrun --nproc-per-node 2 -m moe_trace run"),
        (("--ddp",), "torchrun --nproc-per-node N"),
        (("--ep", 2), "Try --fsdp 2 --ep 2"),
        (("--fsdp", 2, "--ep", 2, "--ep-implementation", "all_reduce"), "--tp 2 --ep 2"),
        (("--ddp", "--fsdp", 2), "not both"),
        (("--fsdp", 0), "--fsdp must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(options: tuple[object, ...], said: str, tmp_path: Path) -> None:
    from moe_trace.cli import main

    assert main(["run", *map(str, options), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torchrun had started this process as one of three."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_another_number_of_processes_is_refused_before_joining(launched: None) -> None:
    with pytest.raises(UsageError, match="need 2 processes, and torchrun started 3"):
        with joined("cpu", 2):
            pass


def test_several_processes_with_nothing_to_split_are_refused(launched: None, tmp_path: Path) -> None:
    from moe_trace.workload.runner import run

    with pytest.raises(UsageError, match="torchrun started 3 processes, and nothing says how"):
        run(RunConfig(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_transformers_without_expert_sizes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import make_dataclass

    import torch
    import transformers

    from moe_trace.workload.sharded import require_support

    older = make_dataclass("DistributedConfig", [("enable_expert_parallel", bool, False)])
    monkeypatch.setattr(transformers, "DistributedConfig", older)
    with pytest.raises(UsageError, match=r"without ep_implementation, ep_size, fsdp_size, tp_size"):
        require_support(Split(fsdp=2), torch.device("cpu"))
    require_support(Split(ddp=True), torch.device("cpu"))


def test_waiting_for_files_ends_when_a_stop_is_asked_for(tmp_path: Path) -> None:
    """The store is torch's own; rank 2 has told of its file, rank 1 never will."""
    import time

    from torch.distributed import HashStore

    store = HashStore()
    Worker(rank=2, world_size=3, store=store).publish("trace", {"file": "trace.json", "host": "here"})
    (tmp_path / "trace.json").touch()
    leader = Worker(world_size=3, store=store)
    leader.stop.only_note()
    leader.stop(15, None)
    start = time.monotonic()
    (problem,) = missing_files(leader, tmp_path, 60.0)
    assert problem.startswith("rank 1 has written no trace")
    assert time.monotonic() - start < 10
    with pytest.raises(RankFailed, match="another one ended"):
        Worker(store=store).stop(15, None)
