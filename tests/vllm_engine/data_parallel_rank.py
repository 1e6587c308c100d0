"""One of two data-parallel ranks, offline, as vLLM's own example starts them.

python data_parallel_rank.py '{"rank": ..., "port": ..., "out": FOLDER}'

Each rank answers every second prompt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from engine_run import prompts

RANKS = 2


def wait_for_the_other(spec: dict[str, Any], what: str) -> None:
    """Ranks step together: a step that one has begun to record, both shall record."""
    folder = Path(spec["out"])
    (folder / f"{what}{spec['rank']}").touch()
    for _ in range(3000):
        if all((folder / f"{what}{rank}").exists() for rank in range(RANKS)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"the other rank did not come to {what}")


def main() -> None:
    spec = json.loads(sys.argv[1])
    rank, folder = spec["rank"], Path(spec["out"])
    os.environ |= {
        "VLLM_DP_RANK": str(rank),
        "VLLM_DP_RANK_LOCAL": str(rank),
        "VLLM_DP_SIZE": str(RANKS),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(spec["port"]),
    }
    from vllm import LLM, SamplingParams

    from moe_trace.demo import demo_path

    llm = LLM(
        str(demo_path()),
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        seed=0,
        disable_log_stats=True,
        enforce_eager=True,
        enable_expert_parallel=True,
        worker_extension_cls="cpu_expert_parallel.ExpertParallelWorker",
        profiler_config={
            "profiler": "torch",
            "torch_profiler_dir": str(folder / "traces"),
            "torch_profiler_with_stack": False,
        },
    )
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    found: dict[str, Any] = {"tokens": []}
    for profiled in (True, False):
        wait_for_the_other(spec, f"before{profiled}")
        if profiled:
            llm.collective_rpc("oracle_start")
            llm.start_profile()
        wait_for_the_other(spec, f"start{profiled}")
        outputs = llm.generate(prompts()[rank::RANKS], sampling, use_tqdm=False)
        found["tokens"].append([list(one.outputs[0].token_ids) for one in outputs])
        wait_for_the_other(spec, f"end{profiled}")
        if profiled:
            llm.stop_profile()
            (found["oracle"],) = llm.collective_rpc("oracle_stop")
    (folder / f"result{rank}.json").write_text(json.dumps(found))
    wait_for_the_other(spec, "done")


if __name__ == "__main__":
    main()
