#!/usr/bin/env python3
"""Record small GPU traces of OLMoE-1B-7B's true shape with random weights, as a user would.

    python scripts/record_gpu_traces.py --out tests/data/h200
    python scripts/record_gpu_traces.py --out traces --all --tar     # with those of record_graph_traces.py,
                                                                     # and two ranks if there are two GPUs

Each workload is recorded with `moe_trace.profile` and written as one merged `.json.gz`. The profiler's trace
can be restored exactly, because merging only adds. To keep them small, the traces have two layers, except
`prefill_decode_16_layers`. A workload that fails is named at the end and does not stop the others.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import OlmoeConfig, OlmoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import moe_trace  # noqa: E402

BOTH = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
VOCAB = 50304


def true_shape(layers: int) -> OlmoeConfig:
    """Return a config with OLMoE-1B-7B-0924's sizes and fewer layers."""
    return OlmoeConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
    )


def tokens(batch: int, length: int, device: str | torch.device = "cuda") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (batch, length), generator=generator).to(device)


def prefill(length: int, implementation: str) -> Callable[[OlmoeForCausalLM], Callable[[], None]]:
    def prepare(model: OlmoeForCausalLM) -> Callable[[], None]:
        model.eval().set_experts_implementation(implementation)
        ids = tokens(1, length)

        def run() -> None:
            with torch.no_grad():
                model(ids)

        return run

    return prepare


def decode(model: OlmoeForCausalLM) -> Callable[[], None]:
    model.eval().set_experts_implementation("grouped_mm")
    ids = tokens(1, 64)

    def run() -> None:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    return run


def prefill_decode(model: OlmoeForCausalLM) -> Callable[[], None]:
    model.eval().set_experts_implementation("grouped_mm")
    ids = tokens(1, 2048)

    def run() -> None:
        with torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            for _ in range(3):
                model(ids[:, :1], past_key_values=cache)

    return run


def generate_static(model: OlmoeForCausalLM) -> Callable[[], None]:
    """Generate with a static cache: transformers compiles the decode step and captures it in CUDA graphs."""
    model.eval().set_experts_implementation("grouped_mm")
    ids = tokens(1, 64)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static"
            )

    return run


def train(checkpointing: dict[str, Any] | None = None) -> Callable[[OlmoeForCausalLM], Callable[[], None]]:
    def prepare(model: OlmoeForCausalLM) -> Callable[[], None]:
        model.train().set_experts_implementation("grouped_mm")
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        ids = tokens(2, 256)

        def run() -> None:
            model(ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        return run

    return prepare


@dataclass(frozen=True)
class Workload:
    """A recorded workload and its options."""

    prepare: Callable[[OlmoeForCausalLM], Callable[[], None]]
    steps: int = 2
    layers: int | None = None
    """Number of layers; by default that of the command line."""
    profiler: dict[str, Any] = field(default_factory=dict)
    """Arguments of `torch.profiler.profile`."""
    hooks_first: bool = False
    """Whether hooks are registered before the first forward, as compiled code needs."""


SHAPES = {"record_shapes": True}
EVERYTHING = SHAPES | {"profile_memory": True, "with_stack": True, "with_modules": True, "with_flops": True}
WORKLOADS = {
    "prefill_eager": Workload(prefill(512, "eager")),
    "prefill_grouped_mm": Workload(prefill(2048, "grouped_mm"), steps=3),
    "prefill_batched_mm": Workload(prefill(16, "batched_mm"), steps=3),
    "decode_grouped_mm": Workload(decode, steps=1),
    "train_grouped_mm": Workload(train(), profiler=SHAPES),
}
MORE_WORKLOADS = {
    "prefill_decode_16_layers": Workload(prefill_decode, steps=1, layers=16),
    "prefill_cuda_only": Workload(
        prefill(512, "grouped_mm"), profiler={"activities": (ProfilerActivity.CUDA,)}
    ),
    "prefill_all_options": Workload(prefill(64, "grouped_mm"), steps=1, profiler=EVERYTHING),
    "train_checkpointed": Workload(train({"use_reentrant": False}), profiler=SHAPES),
    "train_checkpointed_reentrant": Workload(train({"use_reentrant": True}), profiler=SHAPES),
    "generate_static_cache": Workload(generate_static, steps=1, hooks_first=True),
}


def true_model(layers: int) -> OlmoeForCausalLM:
    """Return a model of the true shape on the GPU, in bfloat16."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        return OlmoeForCausalLM(true_shape(layers)).to(torch.bfloat16)


def record(name: str, workload: Workload, layers: int, out: Path) -> None:
    model = true_model(workload.layers or layers)
    tracer = moe_trace.MoETracer(model)
    if workload.hooks_first:
        tracer.start()
    run = workload.prepare(model)
    for _ in range(2):
        run()
    if not workload.hooks_first:
        tracer.start()
    torch.cuda.synchronize()
    before = len(tracer.samples())
    with torch.profiler.profile(**{"activities": BOTH} | workload.profiler) as prof:
        tracer.attach(prof)
        for _ in range(workload.steps):
            run()
            torch.cuda.synchronize()
            prof.step()
    target = out / f"{name}.pt.trace.json.gz"
    prof.export_chrome_trace(str(target))
    tracer.stop()
    print(
        f"{target}: {target.stat().st_size / 1024:.0f} KiB, {len(tracer.samples()) - before} samples of "
        f"{before} before it, {tracer.recording().lost}",
        flush=True,
    )


def record_two_ranks(out: Path) -> None:
    """Record the demo model, expert-parallel on two GPUs."""
    script = Path(__file__).with_name("record_ep_steps.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    options = ["--device", "cuda", "--steps", "2", "--rows", "1", "--tokens", "64"]
    subprocess.run([*command, *options, "--out", str(out / "nccl_ep2")], check=True, timeout=240)


def record_graphs(out: Path) -> None:
    script = Path(__file__).with_name("record_graph_traces.py")
    subprocess.run([sys.executable, str(script), "--out", str(out / "graphs")], check=True, timeout=400)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="record every kind of trace")
    parser.add_argument("--only", nargs="+", choices=[*WORKLOADS, *MORE_WORKLOADS])
    parser.add_argument("--tar", action="store_true", help="put all files into OUT/gpu_traces.tar")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    known = WORKLOADS | MORE_WORKLOADS
    names = arguments.only or (list(known) if arguments.all else list(WORKLOADS))
    parts = [(name, lambda name=name: record(name, known[name], arguments.layers, out)) for name in names]
    if arguments.all:
        parts.append(("graphs", lambda: record_graphs(out)))
        if torch.cuda.device_count() > 1:
            parts.append(("two ranks", lambda: record_two_ranks(out)))
    failed = []
    for name, part in parts:
        try:
            part()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if arguments.tar:
        with tarfile.open(out / "gpu_traces.tar", "w") as tar:
            for path in sorted(out.rglob("*.gz")):
                tar.add(path, path.relative_to(out))
                path.unlink()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
