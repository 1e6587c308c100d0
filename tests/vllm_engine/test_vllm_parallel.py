"""Expert-parallel ranks of vLLM's real engine, on a CPU."""

from __future__ import annotations

import pytest

import moe_trace
from moe_trace.cli import main
from vllm_runs import PROMPT_TOKENS, EngineRun, Runner, counts_in

pytestmark = pytest.mark.timeout(900)
ASSIGNMENTS = 4 * (PROMPT_TOKENS + 4 * 5)


@pytest.fixture(scope="module")
def experts_split(engine_run: Runner) -> EngineRun:
    return engine_run(
        [{"kind": "profile", "oracle": True}, {"kind": "plain"}],
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enforce_eager=True,
        worker_extension_cls="engine_run.OracleWorker",
    )


def test_counts_of_expert_parallel_ranks_are_vllms_own(experts_split: EngineRun) -> None:
    oracles = experts_split.result["phases"][0]["ranks"]
    names = sorted(trace.name for trace in experts_split.traces)
    print(names)
    assert len(names) == 2
    held = {}
    for trace in experts_split.traces:
        recording = moe_trace.read_recording(trace)
        print(recording.parallel, recording.routers[0].held_experts)
        assert counts_in(trace) == oracles[recording.rank]["captured"] == oracles[recording.rank]["by_logits"]
        assert not any(recording.lost.calls.values())
        assert main(["check", str(trace)]) == 0
        held[recording.rank] = recording.routers[0].held_experts
    assert held == {0: tuple(range(8)), 1: tuple(range(8, 16))}
    assert experts_split.tokens[0] == experts_split.tokens[1]
