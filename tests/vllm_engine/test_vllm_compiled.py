"""Tests of vLLM's default on a CPU: compiled code in a separate worker process."""

from __future__ import annotations

from typing import Any

import pytest

import moe_trace
from moe_trace.cli import main
from vllm_runs import PROMPT_TOKENS, EngineRun, Runner, counts_in

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm_cache"))}


@pytest.fixture(scope="module")
def without(engine_run: Runner, cache: dict[str, str]) -> EngineRun:
    """First: what it compiles and keeps has no hooks in it."""
    return engine_run([{"kind": "plain"}], in_process=True, environment=cache | {"MOE_TRACE_VLLM": "0"})


@pytest.fixture(scope="module", params=["cold", "warm"])
def compiled(
    request: pytest.FixtureRequest, engine_run: Runner, cache: dict[str, str], without: EngineRun
) -> EngineRun:
    """The second start finds what the first one compiled with hooks."""
    phases = [
        {"kind": "profile"},
        {"kind": "plain"},
        {"kind": "profile", "options": {"profile_prefix": "again"}},
    ]
    return engine_run(phases, in_process=True, environment=cache, compiled_oracle=True)


def test_counts_are_vllms_own_of_every_call(compiled: EngineRun) -> None:
    assert len(compiled.traces) == 2
    for phase, trace in zip(compiled.result["phases"][::2], compiled.traces, strict=True):
        by_layer = [list(calls) for calls in zip(*phase["captured_steps"], strict=True)]
        assert list(counts_in(trace).values()) == by_layer
        assert sum(map(sum, by_layer[0])) == 4 * (PROMPT_TOKENS + 4 * 5)


def test_every_call_is_placed_and_the_traces_pass_check(compiled: EngineRun) -> None:
    for trace in compiled.traces:
        recording = moe_trace.read_recording(trace)
        assert len(recording.samples) == 24
        assert all(sample.placement is not None for sample in recording.samples)
        assert not any(recording.lost.calls.values()) and not recording.lost.unplaced
        assert main(["check", str(trace)]) == 0


def test_the_tokens_are_those_of_vllm_alone(compiled: EngineRun, without: EngineRun) -> None:
    assert all(tokens == without.tokens[0] for tokens in compiled.tokens)


def test_two_workers_record_the_same_decisions(engine_run: Runner) -> None:
    run = engine_run(
        [{"kind": "profile", "oracle": True}, {"kind": "plain"}],
        tensor_parallel_size=2,
        enforce_eager=True,
        worker_extension_cls="engine_run.OracleWorker",
    )
    ranks = {}
    for trace in run.traces:
        recording = moe_trace.read_recording(trace)
        ranks[recording.rank, recording.world_size] = counts_in(trace)
        assert main(["check", str(trace)]) == 0
    first, second = run.result["phases"][0]["ranks"]
    assert ranks == {(0, 2): first["captured"], (1, 2): second["captured"]}
    assert first == second and first["captured"] == first["by_logits"]
    # How many steps it takes depends on when the requests arrive; how many tokens, does not.
    assert {sum(map(sum, calls)) for calls in first["captured"].values()} == {4 * (PROMPT_TOKENS + 4 * 5)}
    assert run.tokens[0] == run.tokens[1]
    assert sorted(trace.name[:12] for trace in run.traces) == ["dp0_pp0_tp0_", "dp0_pp0_tp1_"]


def test_two_workers_record_the_same_decisions_in_compiled_code(engine_run: Runner) -> None:
    """Each compiles its own part of the model, in a process of its own."""
    parts: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "worker_extension_cls": "compiled_oracle_worker.CompiledOracleWorker",
    }
    without = engine_run([{"kind": "plain"}], environment={"MOE_TRACE_VLLM": "0"}, **parts)
    run = engine_run([{"kind": "profile", "oracle": True}, {"kind": "plain"}], **parts)
    ranks = {}
    for trace in run.traces:
        recording = moe_trace.read_recording(trace)
        ranks[recording.rank, recording.world_size] = list(counts_in(trace).values())
        assert all(sample.placement is not None and sample.in_graph for sample in recording.samples)
        assert not any(recording.lost.calls.values()) and not recording.lost.unplaced
        assert main(["check", str(trace)]) == 0
    steps = [oracle["captured_steps"] for oracle in run.result["phases"][0]["ranks"]]
    first, second = ([list(calls) for calls in zip(*one, strict=True)] for one in steps)
    assert ranks == {(0, 2): first, (1, 2): second} and first == second
    assert {sum(map(sum, calls)) for calls in first} == {4 * (PROMPT_TOKENS + 4 * 5)}
    assert run.tokens[0] == run.tokens[1] == without.tokens[0]
