"""Record the traces of tests/data/vllm_traces: vLLM on the demo model, with moe_trace installed.

    python scripts/record_vllm_traces.py tests/data/vllm_traces

Needs vLLM (`make test-vllm` creates an environment with it) and moe_trace installed there, because the
engine's processes find moe_trace by its entry point. Writes three folders: `eager` and `compiled` with one
worker each, and `tp2` with two tensor-parallel workers. Each engine answers LENGTHS prompts with TOKENS
tokens, so few at a time that steps mix prefill and decode.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = (9, 30, 17)
TOKENS = 5
ENGINES = {"eager": (1, True), "compiled": (1, False), "tp2": (2, True)}
"""Folder -> tensor-parallel size, and whether the engine is eager."""


def record(folder: Path, tensor_parallel_size: int, eager: bool) -> None:
    """Start the engine once and record its traces."""
    from vllm import LLM, SamplingParams

    from moe_trace.demo import DEMO_PROMPTS, demo_path

    llm = LLM(
        str(demo_path()),
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        seed=0,
        disable_log_stats=True,
        enforce_eager=eager,
        tensor_parallel_size=tensor_parallel_size,
        profiler_config={
            "profiler": "torch",
            "torch_profiler_dir": str(folder),
            "torch_profiler_with_stack": False,
        },
    )
    text = "".join(DEMO_PROMPTS.values()).encode()
    prompts = [{"prompt_token_ids": [byte + 3 for byte in text[: length * 3 : 3]]} for length in LENGTHS]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    llm.start_profile()
    llm.generate(prompts, sampling, use_tqdm=False)
    llm.stop_profile()


def main() -> None:
    """Run each engine in a separate process, because one process cannot hold two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help="record only this engine, in this process")
    arguments = parser.parse_args()
    if arguments.engine is not None:
        record(arguments.out, *ENGINES[arguments.engine])
        return
    for name in ENGINES:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, folder, "--engine", name], check=True)
            (arguments.out / name).mkdir(parents=True, exist_ok=True)
            for trace in sorted(Path(folder).glob("*.pt.trace.json.gz")):
                shutil.copy(trace, arguments.out / name)


if __name__ == "__main__":
    main()
