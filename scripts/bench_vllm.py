#!/usr/bin/env python3
"""Measure the overhead of moe_trace in the real vLLM engine, with two engines that answer in turn.

    python scripts/bench_vllm.py [--only idle,...] [--pairs 15]

Run it in an environment that has vLLM. One engine has moe_trace and one does not. Each runs in a separate
process with one thread, and they answer the same requests alternately. A ratio compares two consecutive
answers, so that other load affects both. Prints the median and the quartiles of the ratios of CPU time, to
which other processes add little, and of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS, EXPERTS, TOP_K, REQUESTS, TOKENS = 4, 32, 8, 8, 24
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Case:
    """What the second engine has in addition to the first."""

    name: str
    says: str
    configured: bool = False
    """Whether vLLM's torch profiler is configured, in both engines."""
    compiled: bool = False
    profiled: bool = False
    """Whether the requests are answered under that profiler, in both engines."""
    itself: bool = False
    """Whether both engines are without moe_trace, which shows how much equal engines differ."""


CASES = (
    Case("noise", "two engines without moe_trace", itself=True),
    Case("idle", "installed; vLLM's profiler not configured"),
    Case("ready", "profiler configured, not running; eager", configured=True),
    Case("ready-compiled", "profiler configured, not running; compiled", configured=True, compiled=True),
    Case("profiled", "profiler running; eager", configured=True, profiled=True),
    Case("profiled-compiled", "profiler running; compiled", configured=True, compiled=True, profiled=True),
)


def engine(case: Case, folder: Path) -> None:
    """Run the child: an engine that answers once for each line of its input and prints what that took."""
    if os.environ["MOE_TRACE_VLLM"] == "1":
        from moe_trace.integrations.vllm.plugin import register

        register()
    from vllm import LLM, SamplingParams

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    profiler = {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False}
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=not case.compiled,
        max_model_len=128,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=256,
        seed=0,
        enable_prefix_caching=False,
        disable_log_stats=True,
        distributed_executor_backend="uni",
        **({"profiler_config": profiler} if case.configured else {}),
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": list(range(5 + r, 25 + r))} for r in range(REQUESTS)]
    llm.generate(prompts, sampling, use_tqdm=False)
    say({"ready": True})
    for _ in sys.stdin:
        if case.profiled:
            llm.start_profile()
        clock, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        took = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
        begun = time.process_time()
        if case.profiled:
            llm.stop_profile()
        say(took | {"stop": time.process_time() - begun})


def say(values: dict[str, Any]) -> None:
    """Print one line that the parent can distinguish from vLLM's output."""
    print("@" + json.dumps(values), flush=True)


class Engine:
    """The parent's view of a child process."""

    def __init__(self, case: Case, folder: Path, *, with_us: bool) -> None:
        self.log = (folder.parent / f"{folder.name}.log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--engine", case.name, str(folder)],
            env=os.environ
            | {
                "MOE_TRACE_VLLM": "1" if with_us else "0",
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CACHE_ROOT": str(folder),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def heard(self) -> dict[str, Any]:
        """Return the child's next line to the parent."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        raise SystemExit(f"an engine ended; see {self.log.name}")

    def answer(self) -> dict[str, Any]:
        """Let the child answer once."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.heard()

    def end(self) -> None:
        """End the child by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def spread(values: list[float]) -> str:
    """Format the median with the first and the third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def compare(case: Case, pairs: int, folder: Path) -> None:
    """Measure a case and print its row."""
    engines = [
        Engine(case, folder / f"{case.name}-{side}", with_us=side == "b" and not case.itself) for side in "ab"
    ]
    for one in engines:
        one.heard()
    for one in engines:
        one.answer()  # the first answer of each engine is slower
    took = [[one.answer() for one in engines] for _ in range(pairs)]
    for one in engines:
        one.end()
    ratios = {key: [b[key] / a[key] for a, b in took] for key in ("cpu", "clock")}
    step = statistics.median(a["cpu"] for a, _ in took) / TOKENS * 1e3
    stop = ""
    if case.profiled:
        a, b = (statistics.median(pair[side]["stop"] for pair in took) for side in (0, 1))
        stop = f"{a:.2f} s, {b:.2f} s"
    print(
        f"| {case.says} | {spread(ratios['cpu'])} | {spread(ratios['clock'])} | {step:.1f} | {stop} |",
        flush=True,
    )


def main() -> None:
    """Parse the options and compare case by case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(case.name for case in CASES))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--engine", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = {case.name: case for case in CASES}
    if arguments.engine:
        engine(cases[arguments.engine[0]], Path(arguments.engine[1]))
        return
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; {LAYERS} layers, {EXPERTS} experts, top-{TOP_K}; {REQUESTS} requests of "
        f"{TOKENS} tokens; {arguments.pairs} pairs\n"
    )
    print("| with moe_trace / without | CPU time | clock | CPU ms a step | stop_profile without, with |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            compare(cases[name], arguments.pairs, Path(folder))


if __name__ == "__main__":
    main()
