"""One run of each number of processes for all modules of these tests."""

from __future__ import annotations

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
    return run_ranks(model_folder, tmp_path_factory.mktemp("two"), 2, (*TWO_RANKS, "mixed"))


@pytest.fixture(scope="session")
def four_ranks(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(model_folder, tmp_path_factory.mktemp("four"), 4, FOUR_RANKS)


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
