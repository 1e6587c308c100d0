"""Tests of reading attributes of the second version of vLLM's model runner, which runs on GPUs only.

The first version is tested with the real engine in tests/vllm_engine.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_trace.integrations.vllm.tokens import StepTokens
from moe_trace.record.forward.batch_tokens import DECODE, PADDING, PREFILL, BatchTokens


class Runner:
    """As vllm/v1/worker/gpu/model_runner.py of vLLM 0.32: states by slot, batches in their own order."""

    def __init__(self, tokens: list[BatchTokens | None]) -> None:
        self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([6, 4, 9], np.int32)))
        self.tokens = tokens
        self.ask: Any = None

    def prepare_inputs(self, scheduler_output: Any) -> Any:
        return scheduler_output.prepared

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> str:
        if not dummy_run:
            self.prepare_inputs(scheduler_output)
        self.tokens.append(self.ask())
        return "output"


def prepared(ids: list[str], slots: list[int], starts: list[int], counts: list[int], known: list[int]) -> Any:
    return SimpleNamespace(
        req_ids=ids,
        num_reqs=len(ids),
        idx_mapping_np=np.array(slots, np.int32),
        num_computed_tokens_np=np.array(starts, np.int32),
        prefill_len_np=np.array(known, np.int32),
        query_start_loc_np=np.array([0, *np.cumsum(counts), 99], np.int32),
        num_tokens_after_padding=8,
    )


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's forward context, 8 tokens with padding."""
    made = SimpleNamespace(ubatch_slices=None, batch_descriptor=SimpleNamespace(num_tokens=8))
    module: Any = ModuleType("vllm.forward_context")
    module.get_forward_context = lambda: made
    module.is_forward_context_available = lambda: True
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
    return made


def test_prompts_resumed_requests_and_drafts(context: SimpleNamespace) -> None:
    told: list[BatchTokens | None] = []
    runner = Runner(told)
    runner.ask = StepTokens(runner)
    runner.ask.follow()
    # b decodes its prompt's first answer; c was preempted with 2 answers and reads 4 tokens of 11 again, from
    # its position 7 on, the newest of which no step has computed.
    step = SimpleNamespace(
        prepared=prepared(["b", "c"], [1, 2], [4, 7], [1, 4], [4, 11]), finished_req_ids=set()
    )
    assert runner.execute_model(step) == "output"
    # a reads a prompt, b verifies two drafts behind its newest token.
    step = SimpleNamespace(
        prepared=prepared(["a", "b"], [0, 1], [0, 5], [4, 3], [6, 4]), finished_req_ids={"c"}
    )
    runner.execute_model(step)
    runner.execute_model(SimpleNamespace(), dummy_run=True)
    first, second, dummy = told
    assert first is not None and second is not None and dummy is not None
    assert first.phases.tolist() == [DECODE, *[PREFILL] * 3, DECODE, *[PADDING] * 3]
    assert first.positions.tolist() == [4, 7, 8, 9, 10, -1, -1, -1]
    assert second.phases.tolist() == [*[PREFILL] * 4, *[DECODE] * 3, PADDING]
    assert second.requests.tolist() == [2] * 4 + [0] * 3 + [-1]
    assert dummy.phases.tolist() == [PADDING] * 8 and dummy.counted_requests() == (0, 0)
    runner.ask.leave()
    assert not {"execute_model", "prepare_inputs"} & vars(runner).keys()


def test_batches_that_vllm_splits_are_not_told(context: SimpleNamespace) -> None:
    told: list[BatchTokens | None] = []
    runner = Runner(told)
    runner.ask = StepTokens(runner)
    runner.ask.follow()
    context.ubatch_slices = [slice(0, 4), slice(4, 8)]
    step = SimpleNamespace(prepared=prepared(["b"], [1], [4], [1], [4]), finished_req_ids=set())
    runner.execute_model(step)
    assert told == [None]
