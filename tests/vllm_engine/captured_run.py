"""Capture routed experts by vLLM and by moe_trace in one run of its engine on the demo model.

python captured_run.py FOLDER

vLLM returns `routed_experts` only with its Model Runner V2, which needs Triton. Its capturer runs without it.
Here the capturer is bound as in vLLM, and its output is collected by request, as vLLM returns it.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def encoded(array: np.ndarray) -> str:
    """As vLLM's server writes it: base64 of a .npy."""
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    folder = Path(sys.argv[1])
    from engine_run import generate, worker_of
    from vllm import LLM
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    from moe_trace.data.routes.writer import save_routes
    from moe_trace.demo import demo_path
    from moe_trace.record.tracer import MoETracer

    llm = LLM(
        model=str(demo_path()),
        **{"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8},
        **{"seed": 0, "disable_log_stats": True, "distributed_executor_backend": "uni"},
    )
    worker = worker_of(llm)
    capturer = RoutedExpertsCapturer(2048, worker.vllm_config)
    bind_routed_experts_capturer(worker.get_model(), capturer)
    rows: list[np.ndarray] = []
    by_request: dict[str, list[np.ndarray]] = {}
    execute = worker.execute_model

    def watched(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute(scheduled, *args, **kwargs)
        tokens, at = scheduled.total_num_scheduled_tokens, 0
        if tokens:
            rows.append(capturer.snapshot_routing_data(tokens).numpy().copy())
            for request in worker.model_runner.input_batch.req_ids:
                count = scheduled.num_scheduled_tokens.get(request, 0)
                by_request.setdefault(request, []).append(rows[-1][at : at + count])
                at += count
        return result

    worker.execute_model = watched
    tracer = MoETracer(worker.get_model(), routes=True)
    with tracer:
        generate(llm)
    save_routes(tracer.routes(), folder / "ours.routes.npz")
    np.save(folder / "rows.npy", np.concatenate(rows))
    with (folder / "responses.jsonl").open("w") as file:
        for chunks in by_request.values():
            choice = {"index": 0, "text": "", "routed_experts": encoded(np.concatenate(chunks))}
            file.write(json.dumps({"choices": [choice]}) + "\n")


if __name__ == "__main__":
    main()
