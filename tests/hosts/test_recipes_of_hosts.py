"""The recipe for other frameworks' profilers, `with MoETracer(model)`, on their own profilers.

`scripts/test_hosts.py` runs each in an environment that has its framework; elsewhere they skip.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moe_trace
from models import tiny_olmoe, token_batch

LAYERS = 3


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def forwards(model: nn.Module, after_each: Any, count: int) -> None:
    for _ in range(count):
        with torch.no_grad():
            model(**token_batch())
        after_each()


def routing_in(folder: Path) -> list[int]:
    """Calls in each trace below a folder."""
    found = sorted(path for path in folder.rglob("*.json*") if path.is_file())
    return [moe_trace.read_summary(path).totals.calls for path in found]


def test_torchtitan_profiler(tmp_path: Path, group: None) -> None:
    profiler = pytest.importorskip("torchtitan.tools.profiler")
    model = tiny_olmoe(layers=LAYERS)
    config = profiler.Profiler.Config(
        enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=2
    )
    with moe_trace.MoETracer(model):
        with config.build().active(base_folder=str(tmp_path / "out")) as prof:
            forwards(model, prof.step, 6)
    assert routing_in(tmp_path / "out") == [2 * LAYERS, 2 * LAYERS]


def test_olmo_core_profiler_callback(tmp_path: Path, group: None) -> None:
    callbacks = pytest.importorskip("olmo_core.train.callbacks.profiler")
    model = tiny_olmoe(layers=LAYERS)
    callback = callbacks.ProfilerCallback(wait=1, warmup=1, active=2, with_stack=False)
    callback._trainer = SimpleNamespace(
        work_dir=tmp_path, device=torch.device("cpu"), persist_working_file=lambda path: path
    )
    with moe_trace.MoETracer(model):
        callback.pre_train()
        callback.pre_load_batch()
        forwards(model, callback.pre_load_batch, 5)
        callback._exit_stack.close()
    logging.getLogger("olmo_core").setLevel(logging.WARNING)
    assert routing_in(tmp_path / "profiler") == [2 * LAYERS]
