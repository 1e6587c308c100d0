"""Description of the tokens in a vLLM forward: stage, request and position; padding and dummy batches.

Read from the host state of vLLM's model runner, as filled by its scheduler; nothing is read from a device.

    decode     a generated token that is computed for the first time: the newest of its request, at position
               max(prompt length, known tokens - 1), and the draft tokens that a speculator put after it
    prefill    every other token: prompts, whole or in chunks, and tokens that a preempted request had
               generated before, which are computed again in one piece when it resumes
    padding    tokens that fill a batch up to the size of a graph, or of the other data-parallel ranks, and
               all tokens of a dummy batch

Batches that vLLM splits for overlap (`ubatch_slices`) are not described, nor forwards that run as one CUDA
graph (`FULL`), in which no model runs on the host. With speculative decoding under asynchronous scheduling
vLLM's own positions on the host are upper bounds, and so are these.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.tracer import MoETracer

_CONTEXT = "vllm.forward_context"


class StepTokens:
    """Callable for `MoETracer.describe_tokens`, called in each forward of a model runner.

    Methods of the runner object are wrapped while it follows, never those of its class.

    Args:
        runner: the worker's `model_runner`, of either version.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self._scheduled: Any = None
        """Scheduler output of the current step; None between steps, where dummy batches run."""
        self._batch: Any = None
        """Batch that the second version prepared from it."""
        self._numbers: dict[str, int] = {}
        """Numbers by request id, while the request is alive."""
        self._next_number = 0
        self._wrapped: list[str] = []

    def follow(self) -> None:
        """Start tracking the current step."""
        execute, runner = self.runner.execute_model, self.runner

        @functools.wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._scheduled = None if kwargs.get("dummy_run") else scheduler_output
            try:
                return execute(scheduler_output, *args, **kwargs)
            finally:
                self._forget(self._scheduled)
                self._scheduled = self._batch = None

        self._wrap("execute_model", execute_model)
        prepare = getattr(runner, "prepare_inputs", None)
        if prepare is not None:

            @functools.wraps(prepare)
            def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
                self._batch = prepare(*args, **kwargs)
                return self._batch

            self._wrap("prepare_inputs", prepare_inputs)

    def leave(self) -> None:
        """Restore the runner."""
        for name in self._wrapped:
            self.runner.__dict__.pop(name, None)
        self._wrapped.clear()

    def _wrap(self, name: str, function: Any) -> None:
        if name not in self.runner.__dict__:
            self._wrapped.append(name)
            setattr(self.runner, name, function)

    def __call__(self) -> BatchTokens | None:
        """Return the tokens of the current forward; None if they cannot be distinguished."""
        context = _forward_context()
        if context is None or getattr(context, "ubatch_slices", None) is not None:
            return None
        descriptor = getattr(context, "batch_descriptor", None)
        size = None if descriptor is None else int(descriptor.num_tokens)
        if self._scheduled is None:
            return None if size is None else self._batch_tokens([], [], [], [], size)
        return self._from_prepared(self._batch, size) if self._batch is not None else self._from_runner(size)

    def _from_runner(self, size: int | None) -> BatchTokens:
        """Read the first version, which keeps the requests of a step in its `input_batch`."""
        batch, counts = self.runner.input_batch, self._scheduled.num_scheduled_tokens
        ids = list(batch.req_ids)
        active = slice(0, len(ids))
        prompts = np.asarray(batch.num_prompt_tokens[active], np.int64)
        known = np.asarray(batch.num_tokens_no_spec[active], np.int64)
        starts = batch.num_computed_tokens_cpu[active]
        return self._batch_tokens(
            ids, [counts[request] for request in ids], starts, np.maximum(prompts, known - 1), size
        )

    def _from_prepared(self, batch: Any, size: int | None) -> BatchTokens:
        """Read the second version's `InputBatch`, where all known tokens of a resumed request are prefill."""
        states = np.asarray(batch.idx_mapping_np)[: batch.num_reqs]
        prompts = np.asarray(self.runner.req_states.prompt_len.np, np.int64)[states]
        known = np.asarray(batch.prefill_len_np[: batch.num_reqs], np.int64)
        tokens = np.diff(batch.query_start_loc_np[: batch.num_reqs + 1])
        starts = batch.num_computed_tokens_np[: batch.num_reqs]
        size = int(batch.num_tokens_after_padding) if size is None else size
        return self._batch_tokens(list(batch.req_ids), tokens, starts, np.maximum(prompts, known - 1), size)

    def _batch_tokens(
        self, ids: list[str], tokens: Any, starts: Any, first: Any, size: int | None
    ) -> BatchTokens:
        for request in ids:
            if request not in self._numbers:
                self._numbers[request] = self._next_number
                self._next_number += 1
        numbers = [self._numbers[request] for request in ids]
        return BatchTokens.of_requests(numbers, tokens=tokens, starts=starts, decode_from=first, size=size)

    def _forget(self, scheduled: Any) -> None:
        """Forget finished requests, whose ids may be reused."""
        for request in getattr(scheduled, "finished_req_ids", None) or ():
            self._numbers.pop(request, None)


def tell_tokens(tracer: MoETracer, worker: Any) -> StepTokens | None:
    """Have a worker's forwards described to a tracer; None if the worker has no such runner."""
    runner = getattr(worker, "model_runner", None)
    if not hasattr(runner, "execute_model"):
        return None
    tokens = StepTokens(runner)
    tokens.follow()
    tracer.describe_tokens(tokens)
    return tokens


def _forward_context() -> Any:
    module = sys.modules.get(_CONTEXT)
    return module.get_forward_context() if module and module.is_forward_context_available() else None
