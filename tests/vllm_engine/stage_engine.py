"""Serve requests of many lengths in the real vLLM engine, and print what its scheduler and its routers did.

python stage_engine.py FOLDER [compiled]: the trace goes into FOLDER/traces. The number of tokens per step is
small, so that chunks of prompts are batched with decode tokens. The cache has few blocks, so that a request
is preempted and recomputed. The last output is, for each forward under the profiler: the requests in batch
order with (id, first position, tokens, prompt length), the positions and ids that the model received, and for
each layer the experts that vLLM's `router.set_capture_fn` received.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from family_engine import runners, write_config

LENGTHS = (120, 121, 122, 5, 40, 17)


def watch_schedule(scheduler: Any, found: list[dict[str, tuple[int, int, int]]]) -> None:
    """By step and request: (first position, tokens, prompt's length), from the scheduler's own output."""
    schedule = scheduler.schedule

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        out = schedule(*args, **kwargs)
        starts = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        cached = out.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        if out.total_num_scheduled_tokens:
            found.append(
                {
                    one: (starts[one], count, scheduler.requests[one].num_prompt_tokens)
                    for one, count in out.num_scheduled_tokens.items()
                }
            )
        return out

    scheduler.schedule = scheduled


def watch_forwards(runner: Any, model: Any, orders: list[Any], given: list[Any]) -> list[Any]:
    """The requests in the order of each batch, and the positions and ids of each forward."""
    prepare = runner._prepare_inputs

    def prepared(*args: Any, **kwargs: Any) -> Any:
        out = prepare(*args, **kwargs)
        orders.append(list(runner.input_batch.req_ids))
        return out

    runner._prepare_inputs = prepared

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given.append([kwargs["positions"].tolist(), kwargs["input_ids"].tolist()])

    return [model.register_forward_pre_hook(hook, with_kwargs=True)]


def main(folder: Path, compiled: bool) -> None:
    """Load, answer under the profiler, print."""
    from vllm import LLM, SamplingParams

    from moe_trace.integrations.vllm.plugin import register

    register()
    llm = LLM(
        str(write_config("mixtral", folder / "model")),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        max_model_len=256,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=6,
        seed=0,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        profiler_config={
            "profiler": "torch",
            "torch_profiler_dir": str(folder / "traces"),
            "torch_profiler_with_stack": False,
        },
    )
    sampling = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, detokenize=False)
    core: Any = llm.llm_engine.engine_core
    core = core.engine_core
    worker = core.model_executor.driver_worker.worker
    model = worker.get_model()
    steps: list[dict[str, tuple[int, int, int]]] = []
    orders: list[list[str]] = []
    given: list[list[list[int]]] = []
    captured: dict[str, list[Any]] = {name: [] for name in runners(model)}
    llm.start_profile()
    before = set(vars(worker.model_runner))
    watch_schedule(core.scheduler, steps)
    handles = watch_forwards(worker.model_runner, model, orders, given)
    if not compiled:
        for name, runner in runners(model).items():
            runner.router.set_capture_fn(lambda ids, calls=captured[name]: calls.append(ids.tolist()))
    prompts: Any = [{"prompt_token_ids": [3 + (7 * i + n) % 500 for i in range(n)]} for n in LENGTHS]
    tokens = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, sampling, use_tqdm=False)]
    worker.execute_dummy_batch()
    for handle in handles:
        handle.remove()
    llm.stop_profile()
    left = [name for name in ("execute_model", "prepare_inputs") if name in vars(worker.model_runner)]
    said = {"tokens": tokens, "steps": steps, "orders": orders, "given": given, "captured": captured}
    print("\n" + json.dumps(said | {"left": left, "wrapped": sorted(before & {"execute_model"})}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "compiled" in sys.argv[2:])
