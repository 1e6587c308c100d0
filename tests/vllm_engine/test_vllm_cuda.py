"""Tests of vLLM's CUDA build: the opaque operator, CUDA graphs, expert parallelism, and its load balancer.

Not yet run, because no GPU with vLLM was available.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_trace
from moe_trace.cli import main
from vllm_runs import PROMPT_TOKENS, EngineRun, Runner, counts_in

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

GENERATED = 4 * 5
"""Tokens that are fed back: the last one of each request is not."""
ASSIGNMENTS = 4 * (PROMPT_TOKENS + GENERATED)
SMALL: dict[str, Any] = {"gpu_memory_utilization": 0.2}


def passes_check(run: EngineRun) -> None:
    for trace in run.traces:
        recording = moe_trace.read_recording(trace)
        assert not any(recording.lost.calls.values()) and not recording.lost.unplaced
        assert main(["check", str(trace)]) == 0


def test_the_opaque_operator_in_eager_mode(engine_run: Runner) -> None:
    run = engine_run(
        [{"kind": "profile", "oracle": True}, {"kind": "plain"}], in_process=True, enforce_eager=True, **SMALL
    )
    found = run.result["phases"][0]
    assert counts_in(run.traces[0]) == found["captured"] == found["by_logits"]
    assert run.tokens[0] == run.tokens[1]
    passes_check(run)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
def test_cuda_graphs(engine_run: Runner, mode: str) -> None:
    """Padding that a graph adds is in vLLM's captured ids as it is in ours."""
    run = engine_run(
        [{"kind": "profile"}, {"kind": "plain"}],
        in_process=True,
        compiled_oracle=True,
        compilation_config={"cudagraph_mode": mode},
        **SMALL,
    )
    by_layer = [list(calls) for calls in zip(*run.result["phases"][0]["captured_steps"], strict=True)]
    assert list(counts_in(run.traces[0]).values()) == by_layer
    first_layer = [s for s in moe_trace.read_recording(run.traces[0]).samples if s.layer == 0]
    padding = sum(s.padding_assignments for s in first_layer)
    told = sum(int(s.assignments.sum()) for s in first_layer) - padding
    # In a graph of the whole step the host meets no call of the model that could be told of its tokens.
    assert told == ASSIGNMENTS if mode == "PIECEWISE" else told >= ASSIGNMENTS
    assert run.tokens[0] == run.tokens[1]
    passes_check(run)


@two_gpus
@pytest.mark.parametrize("balanced", [False, True], ids=["experts_stay", "experts_move"])
def test_expert_parallelism(engine_run: Runner, balanced: bool) -> None:
    """Counts are of logical experts, wherever the load balancer has put their replicas."""
    balancer: dict[str, Any] = {
        "enable_eplb": True,
        "eplb_config": {
            "window_size": 4,
            "step_interval": 4,
            "num_redundant_experts": 2,
            "use_async": False,
        },
    }
    run = engine_run(
        [{"kind": "profile", "oracle": True}, {"kind": "plain"}],
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enforce_eager=True,
        worker_extension_cls="engine_run.OracleWorker",
        **(balancer if balanced else {}),
        **SMALL,
    )
    oracles = run.result["phases"][0]["ranks"]
    assert len(run.traces) == 2
    held = []
    for trace in run.traces:
        recording = moe_trace.read_recording(trace)
        assert counts_in(trace) == oracles[recording.rank]["captured"]
        held.append(set(recording.routers[0].held_experts or ()))
    if not balanced:
        assert held[0] | held[1] == set(range(16)) and not held[0] & held[1]
    assert run.tokens[0] == run.tokens[1]
    passes_check(run)
