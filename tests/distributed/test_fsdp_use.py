"""Tests of a model sharded by FSDP 2 over two processes: ways to call it, generation, padding, training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distributed.launching import environment

ACTS = {
    # (stage, phase) of the forwards in order, and outputs that were compared
    "generate": ([("prefill", "forward"), *[("decode", "forward")] * 3], 1),
    "inner_model": ([("prefill", "forward")] * 3, 3),
    "padded": ([("prefill", "forward")], 1),
    "train": ([("train", "forward"), ("train", "recompute")], 26),
}
LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("fsdp_use")
    command = [sys.executable, "-m", "distributed.fsdp_use", str(folder)]
    children = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), WORLD_SIZE="2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [child.communicate(timeout=250)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0, 0], printed
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("act", ACTS)
def test_what_is_recorded_is_what_the_experts_received(act: str, notes: list[dict[str, Any]]) -> None:
    forwards, _ = ACTS[act]
    for rank in notes:
        note = rank[act]
        assert [[s["layer"], s["assignments"]] for s in note["samples"]] == note["received"]
        assert set(note["seen"].values()) == {len(forwards)} and len(note["seen"]) == LAYERS
        assert (note["lost"], note["experts_without_router"]) == ({}, 0)
    first, second = ([call for _, call in rank[act]["received"]] for rank in notes)
    assert first != second  # each rank has tokens of its own


@pytest.mark.parametrize("act", ACTS)
def test_each_call_stands_in_its_forward(act: str, notes: list[dict[str, Any]]) -> None:
    forwards, _ = ACTS[act]
    for number, rank in enumerate(notes):
        found = Counter((s["step"], s["call"], s["stage"], s["phase"]) for s in rank[act]["samples"])
        steps = [0 if act == "train" else call for call in range(len(forwards))]
        expected = [(step, call, *forwards[call]) for call, step in enumerate(steps)]
        assert found == dict.fromkeys(expected, LAYERS)
        padding = (1 + number) * TOP_K if act == "padded" else 0
        assert {s["padding"] for s in rank[act]["samples"]} == {padding}


@pytest.mark.parametrize("act", ACTS)
def test_outputs_and_gradients_are_bit_equal(act: str, notes: list[dict[str, Any]]) -> None:
    for rank in notes:
        assert rank[act]["same"] == [True, True] and rank[act]["outputs"] == ACTS[act][1]
