"""Tests that the first recorded step of a fresh process imports, compiles and pins nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT

CHILD = """
import json, os, sys
from pathlib import Path
import torch
from torch.profiler import profile
sys.path[:0] = [{tests!r}]
import moe_trace
from moe_trace.integrations.scalar_logger import ScalarLogger
from models import tiny_olmoe, token_batch

device = {device!r}
model = tiny_olmoe(hidden_size=64, intermediate_size=32, experts=64, top_k=8)
model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).train()
batch = {{name: value.to(device) for name, value in token_batch(2, {length}).items()}}

def compiled_files():
    return sorted(str(p) for p in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*"))

def step():
    model(**batch, labels=batch["input_ids"]).loss.backward()

def pinned():
    return torch.cuda.host_memory_stats().get("num_host_alloc", 0) if device == "cuda" else 0

for _ in range(2):
    step()
with profile():  # torch's own first imports and allocations
    step()
with {context} as context:
    before = set(sys.modules), compiled_files(), pinned()
    step()
    {after_step}
    after = set(sys.modules), compiled_files(), pinned()
print(json.dumps({{
    "imported": sorted(after[0] - before[0]), "compiled": before[1] != after[1],
    "pinned": after[2] - before[2], "ready": len(before[1]),
}}))
"""
CONTEXTS = {
    "profile": ("moe_trace.profile(model)", "pass"),
    "scalars": ("ScalarLogger(moe_trace.MoETracer(model).__enter__(), {folder!r})", "context.step()"),
}


def first_step(tmp_path: Path, context: str, device: str, length: int) -> dict[str, Any]:
    made, after_step = CONTEXTS[context]
    code = CHILD.format(
        tests=str(ROOT / "tests"),
        device=device,
        length=length,
        context=made.format(folder=str(tmp_path / "runs")),
        after_step=after_step,
    )
    empty = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | empty
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_first_step_imports_nothing(tmp_path: Path, context: str) -> None:
    found = first_step(tmp_path, context, "cpu", length=8)
    assert found["imported"] == []


@pytest.mark.cuda
@pytest.mark.parametrize("length", [8, 2400])  # waits for more, and is reduced within the step
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_first_step_on_a_gpu_compiles_nothing(tmp_path: Path, context: str, length: int) -> None:
    found = first_step(tmp_path, context, "cuda", length)
    assert found["imported"] == []
    assert not found["compiled"]
    assert found["ready"] > 0, "the fused kernels were compiled before"
    assert found["pinned"] == 0
