"""Tests of prefill and decode in mixed steps of the real vLLM engine, against its scheduler and its routers.

The oracle is the scheduler's content of each step, and the experts of each token from `set_capture_fn`. A
token is a decode token if it was generated and no earlier step computed it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_vllm_families import QUIET

import moe_trace

pytest.importorskip("vllm.version", reason="needs vLLM: make test-vllm")

ENGINE = Path(__file__).with_name("stage_engine.py")
EXPERTS = 8
pytestmark = pytest.mark.timeout(600)


def serve(folder: Path, *options: str) -> tuple[dict[str, Any], Path]:
    """What the engine said, and the trace that it wrote."""
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(folder), *options],
        env=os.environ | QUIET | {"VLLM_CACHE_ROOT": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    assert done.returncode == 0 and len(said) == 1, done.stderr[-4000:]
    (trace,) = (folder / "traces").glob("*.pt.trace.json*")
    return json.loads(said[0]), trace


@dataclass
class Truth:
    """One forward: of each real token its request, position, and whether it decodes; then padding."""

    requests: list[str]
    positions: list[int]
    decodes: list[bool]
    rows: int


def truth_of(said: dict[str, Any]) -> list[Truth]:
    """By forward; the last one is a dummy batch."""
    found, seen = [], set[tuple[str, int]]()
    assert len(said["steps"]) == len(said["orders"]) == len(said["given"]) - 1
    for step, order, (positions, _) in zip(said["steps"], said["orders"], said["given"], strict=False):
        truth = Truth([], [], [], len(positions))
        assert sorted(order) == sorted(step)
        for request in order:
            start, count, prompt = step[request]
            for position in range(start, start + count):
                truth.requests.append(request)
                truth.positions.append(position)
                truth.decodes.append(position >= prompt and (request, position) not in seen)
                seen.add((request, position))
        assert positions[: len(truth.positions)] == truth.positions  # what the model was given
        found.append(truth)
    return [*found, Truth([], [], [], len(said["given"][-1][0]))]


def counts(ids: np.ndarray, rows: list[int]) -> list[int]:
    return np.bincount(ids[rows].ravel(), minlength=EXPERTS).tolist()


def check(said: dict[str, Any], trace: Path) -> list[Any]:
    """Every call of the trace is split as the scheduler's tokens are; returns the samples."""
    truth, recording = truth_of(said), moe_trace.read_recording(trace)
    samples = [*recording.samples]
    first = min(sample.call for sample in samples)
    by_layer = {int(name.split(".")[2]): calls for name, calls in said["captured"].items()}
    assert len(samples) == 2 * len(truth)
    for sample in samples:
        call = sample.call - first  # code that vLLM compiles is run before the profiler starts
        of = truth[call]
        decode = [i for i, decodes in enumerate(of.decodes) if decodes]
        prefill = [i for i, decodes in enumerate(of.decodes) if not decodes]
        assert sample.tokens == of.rows
        assert (sample.prefill_tokens, sample.decode_tokens) == (len(prefill), len(decode))
        assert sample.requests == len(set(of.requests))
        assert sample.prefill_requests == len({of.requests[i] for i in prefill})
        expected = "mixed" if prefill and decode else "prefill" if prefill else "decode"
        assert sample.stage == expected
        slots = [len(prefill) * 2, len(decode) * 2, 2 * (of.rows - len(of.requests))]
        split = [int(sample.prefill_assignments.sum()), int(sample.decode_assignments.sum())]
        assert [*split, sample.padding_assignments] == slots
        if any(said["captured"].values()):
            ids = np.array(by_layer[sample.layer][call])
            assert sample.assignments.tolist() == counts(ids, [*range(of.rows)])
            assert sample.prefill_assignments.tolist() == counts(ids, prefill)
            assert sample.decode_assignments.tolist() == counts(ids, decode)
    return samples


def test_mixed_steps_are_split_as_the_scheduler_made_them(tmp_path: Path) -> None:
    said, trace = serve(tmp_path)
    samples = check(said, trace)
    stages = [sample.stage for sample in samples]
    assert {"prefill", "decode", "mixed"} == set(stages)
    # Chunks of prompts, a preempted request that was computed again, and a dummy batch were among them.
    computed = [(r, p) for t in truth_of(said) for r, p in zip(t.requests, t.positions, strict=True)]
    assert len(computed) > len(set(computed))
    again = [
        (position, prompt)
        for truth, step in zip(truth_of(said), said["steps"], strict=False)
        for request, position, decodes in zip(truth.requests, truth.positions, truth.decodes, strict=True)
        for prompt in [step[request][2]]
        if position >= prompt and not decodes
    ]
    assert again
    assert samples[-1].requests == 0 and samples[-1].padding_assignments == 2 * samples[-1].tokens
    assert said["left"] == [] and said["wrapped"] == ["execute_model"]

    summary = moe_trace.read_summary(trace)
    assert list(summary.stages) == ["prefill", "decode", "mixed"]
    for stage in ("prefill", "decode"):
        pure = sum(int(s.assignments.sum()) for s in samples if s.stage == stage)
        of_mixed = sum(int(getattr(s, f"{stage}_assignments").sum()) for s in samples if s.stage == "mixed")
        assert summary.stages[stage].totals.assignments == pure + of_mixed


def test_compiled_steps_are_split_too(tmp_path: Path) -> None:
    said, trace = serve(tmp_path, "compiled")
    samples = check(said, trace)
    assert all(sample.in_graph for sample in samples)
    assert {"prefill", "decode", "mixed"} == {sample.stage for sample in samples}
