"""Tests of vLLM's arrays of routed experts: reading, checks, and equality with the recorded routes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_trace.cli import main
from moe_trace.data.routes.reader import read_routes

pytestmark = pytest.mark.timeout(600)
SCRIPT = Path(__file__).with_name("captured_run.py")
LENGTHS = [length + 5 for length in (40, 25, 31, 17)]  # what the last token chose, nobody computed


@pytest.fixture(scope="module")
def captured(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    of_vllm = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=os.environ | quiet | of_vllm | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_our_routes_are_what_vllm_captured(captured: Path) -> None:
    ours, theirs = read_routes(captured / "ours.routes.npz"), np.load(captured / "rows.npy")
    assert theirs.shape == (sum(LENGTHS), 4, 4)
    np.testing.assert_array_equal(ours.expert_ids, theirs)


def test_responses_of_its_server_are_read_and_checked(captured: Path, tmp_path: Path) -> None:
    out = tmp_path / "vllm.routes.npz"
    found = captured / "responses.jsonl"
    assert main(["routes", "import", str(found), "--num-experts", "16", "-o", str(out)]) == 0
    assert main(["routes", "check", str(out)]) == 0
    routes = read_routes(out)
    assert [int((routes.sequence == i).sum()) for i in range(4)] == LENGTHS
    assert routes.position.tolist() == [place for length in LENGTHS for place in range(length)]


def test_diff_of_both_finds_nothing(
    captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.routes.npz"
    assert main(["routes", "import", str(captured / "rows.npy"), "--num-experts", "16", "-o", str(out)]) == 0
    capsys.readouterr()
    assert main(["routes", "diff", str(captured / "ours.routes.npz"), str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{sum(LENGTHS)} tokens" in text and "100.0 %" in text
