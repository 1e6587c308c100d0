"""Tests of families of models in the real vLLM engine: counts equal vLLM's, and tokens do not change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from family_engine import FAMILIES

import moe_trace
from moe_trace.cli import main
from paths import ROOT

pytest.importorskip("vllm.version", reason="needs vLLM: make test-vllm")

ENGINE = Path(__file__).with_name("family_engine.py")
QUIET = {
    "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def engine(family: str, folder: Path, **environment: str) -> tuple[dict[str, Any], Path]:
    """What the engine said, and the trace that it wrote."""
    done = subprocess.run(
        [sys.executable, str(ENGINE), family, str(folder)],
        env=os.environ | QUIET | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    assert done.returncode == 0 and len(said) == 1, done.stderr[-4000:]
    (trace,) = (folder / "traces").glob("*.pt.trace.json*")
    return json.loads(said[0]), trace


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_vllms_own_and_tokens_are_the_same(family: str, tmp_path: Path) -> None:
    said, trace = engine(family, tmp_path / "on")
    alone, plain = engine(family, tmp_path / "off", MOE_TRACE_VLLM="0")
    assert said["tokens"][0] == said["tokens"][1] == said["tokens"][2]
    assert said["tokens"] == alone["tokens"] and said["captured"] == alone["captured"]

    recording = moe_trace.read_recording(trace)
    found: dict[int, list[list[int]]] = {}
    for sample in recording.samples:
        found.setdefault(sample.layer, []).append([int(count) for count in sample.assignments])
    expected = {int(name.split(".")[2]): calls for name, calls in said["captured"].items()}
    assert found == expected and all(len(calls) > 6 for calls in found.values())
    lost = recording.lost
    assert not lost.calls and not lost.misread and not lost.never_called and not lost.without_range
    assert all(sample.placement is not None for sample in recording.samples)
    assert all(sample.router_entropy is not None for sample in recording.samples)
    top_k = FAMILIES[family]["num_experts_per_tok"]
    assert {router.top_k for router in recording.routers} == {top_k}
    assert main(["check", str(trace)]) == 0
    with pytest.raises(moe_trace.MoETraceError):
        moe_trace.read_recording(plain)


def test_shared_experts_and_flops_are_described(tmp_path: Path) -> None:
    """DeepSeek-V3: three matrices of 128 x 32 an expert, and the same of the shared one beside them."""
    _, trace = engine("deepseek_v3", tmp_path)
    routers = moe_trace.read_recording(trace).routers
    assert [router.layer for router in routers] == [1, 2]
    for router in routers:
        assert (router.num_experts, router.top_k) == (16, 4)
        assert router.expert_flops_per_slot == router.shared_flops_per_token == 2 * 3 * 128 * 32
        assert router.router_flops_per_token == 2 * 128 * 16
