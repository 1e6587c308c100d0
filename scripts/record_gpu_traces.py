#!/usr/bin/env python3
"""Record the small GPU traces under tests/data: OLMoE-1B-7B's true shape, a few layers, random weights.

    python scripts/record_gpu_traces.py --out tests/data/h200

Each workload is recorded with `moe_trace.profile` and written as one merged `.json.gz`; the trace as the
profiler wrote it can be had back exactly, because merging only adds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from transformers import OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moe_trace

VOCAB = 50304


def true_shape(layers: int) -> OlmoeConfig:
    """OLMoE-1B-7B-0924's sizes, with fewer layers."""
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


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (batch, length), generator=generator).cuda()


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


def train(model: OlmoeForCausalLM) -> Callable[[], None]:
    model.train().set_experts_implementation("grouped_mm")
    ids = tokens(2, 256)

    def run() -> None:
        model(ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


WORKLOADS = {
    "prefill_eager": (prefill(512, "eager"), 2),
    "prefill_grouped_mm": (prefill(2048, "grouped_mm"), 3),
    "prefill_batched_mm": (prefill(16, "batched_mm"), 3),
    "decode_grouped_mm": (decode, 1),
    "train_grouped_mm": (train, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = OlmoeForCausalLM(true_shape(arguments.layers)).to(torch.bfloat16)
    for name, (prepare, steps) in WORKLOADS.items():
        run = prepare(model)
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with moe_trace.profile(model, activities=activities, record_shapes=name.startswith("train")) as prof:
            for _ in range(steps):
                run()
                torch.cuda.synchronize()
                prof.step()
        target = arguments.out / f"{name}.pt.trace.json.gz"
        prof.export_chrome_trace(str(target))
        print(f"{target}: {target.stat().st_size / 1024:.0f} KiB, {len(prof.tracer.samples())} samples")


if __name__ == "__main__":
    main()
