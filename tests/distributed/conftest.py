"""Fixtures that share one run per number of processes among all modules."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from distributed import checks
from distributed.launching import Ranks, run_ranks
from distributed.modes import FOUR_RANKS, TWO_RANKS, global_batch
from models import tiny_olmoe


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_olmoe")
    tiny_olmoe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_ranks(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_once(model_folder, tmp_path_factory, 2, (*TWO_RANKS, "mixed"))


@pytest.fixture(scope="session")
def four_ranks(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_once(model_folder, tmp_path_factory, 4, FOUR_RANKS)


def run_once(
    model: Path, tmp_path_factory: pytest.TempPathFactory, world_size: int, modes: tuple[str, ...]
) -> Ranks:
    """One run for all workers of the test session: it takes a minute or two, and files go to any worker."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / f"{world_size}_ranks"
    with (folder / f"{world_size}_ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done").exists():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            run_ranks(model, out, world_size, modes)
            (out / "done").touch()
    return Ranks(out, world_size)


@pytest.fixture(scope="session")
def alone() -> dict[str, Any]:
    """The single process: counts by router, logits, and the model's own figures."""
    import torch

    import moe_trace

    model = tiny_olmoe()
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        logits = model(**global_batch()).logits
    recording = tracer.recording()
    assert recording.parallel is None
    assert all(r.held_experts is None for r in recording.routers)
    assert all(s.dispatched is None and s.slot_bytes is None for s in recording.samples)
    samples = [
        {"site": s.site, "phase": s.phase, "assignments": s.assignments.tolist()} for s in recording.samples
    ]
    return {"counts": checks.counts(samples), "logits": logits.numpy(), "recording": recording}
