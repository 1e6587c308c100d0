"""Tests of the parallel modes over NCCL, one GPU per rank, with worker and checks of the gloo tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed import checks
from distributed.launching import ROOT, Ranks, environment, run_ranks, transformers_splits_experts
from distributed.modes import TWO_RANKS, global_batch
from models import tiny_olmoe

torch = pytest.importorskip("torch")
SIZES = {"hidden_size": 64, "intermediate_size": 32}  # grouped_mm wants rows of 16 bytes
EXCHANGES = [
    ("ep_all_to_all", "inference"),
    ("ep_all_to_all", "training"),
    ("ep_slices", "inference"),
    ("ep_slices", "training"),
    ("ep_auto", "training"),
]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not transformers_splits_experts(), reason="this transformers splits no experts"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    model = tmp_path_factory.mktemp("model")
    tiny_olmoe(**SIZES).save_pretrained(model)
    return run_ranks(model, tmp_path_factory.mktemp("nccl"), 2, TWO_RANKS, device="cuda")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Counts of the single process, on one of the GPUs."""
    import moe_trace

    model: Any = tiny_olmoe(**SIZES).cuda()
    batch = {name: value.cuda() for name, value in global_batch().items()}
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**batch)
    samples = [
        {"site": s.site, "phase": s.phase, "assignments": s.assignments.tolist()} for s in tracer.samples()
    ]
    return checks.counts(samples)


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_counts_over_ranks_are_those_of_the_single_process(
    mode: str, ranks: Ranks, expected: dict[str, np.ndarray]
) -> None:
    notes = ranks.notes(mode)
    for part in ("inference", "training"):
        checks.check_counts(notes, expected, part)
        checks.check_sharers_agree(notes, part)
    checks.check_counts(notes, expected, "training", phase="recompute")


@pytest.mark.parametrize("mode", TWO_RANKS)
def test_nothing_is_changed_and_no_collective_added(mode: str, ranks: Ranks) -> None:
    checks.check_untouched(ranks.notes(mode))


@pytest.mark.parametrize(("mode", "part"), EXCHANGES)
def test_recorded_sent_and_received_are_one_matrix(
    mode: str, part: str, ranks: Ranks, expected: dict[str, np.ndarray]
) -> None:
    notes = ranks.notes(mode)
    checks.check_exchange(notes, expected, part)
    checks.check_bytes(notes, part)


def test_a_device_map_over_two_gpus() -> None:
    import moe_trace
    from moe_trace.demo import load_demo_model

    pytest.importorskip("accelerate")
    alone, _ = load_demo_model(device="cuda:0")
    spread = type(alone).from_pretrained(
        alone.config.name_or_path,
        dtype=torch.float32,
        device_map={f"model.layers.{i}": i // 2 for i in range(4)}
        | {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1},
    )
    ids = torch.arange(3, 120, device="cuda:0").reshape(3, -1)
    counts = []
    for model in (alone, spread):
        with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
            model(input_ids=ids)
        counts.append([s.assignments.tolist() for s in tracer.samples()])
    assert counts[0] == counts[1]


def test_the_benchmark_runs_and_counts_no_collective_more(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "scripts" / "bench_ranks.py"), "--device", "cuda", "--pairs", "2", "--length", "256"]
    done = subprocess.run(
        [*launcher, *script], capture_output=True, text=True, timeout=280, env=environment(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "| ratio |" in done.stdout
