"""Tests of vLLM in eager mode: counts equal vLLM's decisions, and nothing else changes."""

from __future__ import annotations

import gzip

import pytest

import moe_trace
from moe_trace.cli import main
from vllm_runs import PROMPT_TOKENS, ROUTERS, EngineRun, Runner, counts_in

pytestmark = pytest.mark.timeout(600)
EXTENSION = "moe_trace.integrations.vllm.extension.MoETraceWorker"


@pytest.fixture(scope="module")
def eager(engine_run: Runner) -> EngineRun:
    phases = [
        {"kind": "plain"},
        {"kind": "profile", "oracle": True},
        {"kind": "plain"},
        {"kind": "profile", "oracle": True, "options": {"profile_prefix": "again"}},
        {"kind": "rpc", "oracle": True},
        {"kind": "profile", "oracle": True, "options": {"delay_iterations": 2, "max_iterations": 2}},
    ]
    return engine_run(phases, in_process=True, enforce_eager=True, worker_extension_cls=EXTENSION)


@pytest.fixture(scope="module")
def without(engine_run: Runner) -> EngineRun:
    phases = [{"kind": "plain"}, {"kind": "profile"}]
    return engine_run(phases, in_process=True, enforce_eager=True, environment={"MOE_TRACE_VLLM": "0"})


@pytest.mark.parametrize("number", [0, 1])
def test_counts_are_vllms_own_of_every_call(eager: EngineRun, number: int) -> None:
    phase, found = eager.result["phases"][1 + 2 * number], counts_in(eager.traces[number])
    assert list(phase["captured"]) == ROUTERS
    assert found == phase["captured"] == phase["by_logits"]
    assert sum(map(sum, found[ROUTERS[0]])) == 4 * (PROMPT_TOKENS + 4 * 5)


@pytest.mark.parametrize("number", [0, 1])
def test_every_call_is_placed_and_the_trace_passes_check(eager: EngineRun, number: int) -> None:
    recording = moe_trace.read_recording(eager.traces[number])
    assert len(recording.samples) == 24
    for sample in recording.samples:
        assert sample.placement is not None and {"router", "experts", "block"} <= set(sample.placement.host)
    assert not any(recording.lost.calls.values()) and recording.lost.samples_without_range == 0
    assert main(["check", str(eager.traces[number])]) == 0


def test_a_profiler_that_waits_and_stops_by_itself_has_its_own_steps(eager: EngineRun) -> None:
    phase = eager.result["phases"][5]
    if phase.get("unsupported"):
        pytest.skip("start_profile of this vLLM takes no delay_iterations")
    assert counts_in(eager.traces[2]) == {name: calls[1:3] for name, calls in phase["captured"].items()}


def test_the_tokens_are_those_of_vllm_alone(eager: EngineRun, without: EngineRun) -> None:
    assert all(tokens == without.tokens[0] for tokens in (*eager.tokens, *without.tokens))


def test_nothing_of_ours_is_left_after_the_profiler(eager: EngineRun) -> None:
    nothing = {"hooks": [], "attributes": []}
    plain, profiled, *_ = eager.result["phases"]
    assert plain["during"] == nothing
    assert profiled["during"]["hooks"], "the test cannot see hooks that are on"
    assert len(profiled["during"]["attributes"]) == 8
    assert all(phase["after"] == nothing for phase in eager.result["phases"])


def test_the_extension_counts_without_the_plugin(eager: EngineRun) -> None:
    phase = eager.result["phases"][4]
    assert phase["sites"] == [ROUTERS]
    assert phase["counts"] == [phase["captured"]]


def test_a_switch_keeps_us_out(without: EngineRun) -> None:
    assert b"moe_trace" not in gzip.decompress(without.traces[0].read_bytes())
    with pytest.raises(moe_trace.MoETraceError):
        moe_trace.read_recording(without.traces[0])
    assert without.result["wrapped"] == []
    assert "moe_trace.integrations.vllm.worker" not in without.result["imported"]


def test_without_a_profiler_nothing_is_loaded_or_wrapped(engine_run: Runner, without: EngineRun) -> None:
    run = engine_run([{"kind": "plain"}], in_process=True, profiler=False, enforce_eager=True)
    assert run.result["wrapped"] == [] and run.tokens[0] == without.tokens[0]
    assert "moe_trace.integrations.vllm.plugin" in run.result["imported"], "vLLM did not find the plugin"
    assert "moe_trace.record" not in " ".join(run.result["imported"])
