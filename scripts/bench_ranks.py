#!/usr/bin/env python3
"""Measure the overhead of recording a training step that is split over processes, and its collectives.

    torchrun --standalone --nproc-per-node 2 scripts/bench_ranks.py                  # small, over gloo
    torchrun --standalone --nproc-per-node 2 scripts/bench_ranks.py --device cuda    # OLMoE-1B-7B's shape

A pair is the same steps bare and under `MoETracer`, one after the other. Its time is that of the slowest
rank. Prints the median of the pairs' ratios with its quartiles, and the number of collectives of a bare and
of a traced step in all process groups. The exit code is 1 if these numbers differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_pairs import SMALL_SHAPE, TRUE_SHAPE, WARM_UP

import moe_trace
from moe_trace.workload.config import EP_IMPLEMENTATIONS, Split
from moe_trace.workload.inputs import make_step
from moe_trace.workload.process_group import Worker, joined
from moe_trace.workload.sharded import load_split_model, require_support

BOUND = 1.005
Context = Callable[[], AbstractContextManager[Any]]


def load(worker: Worker, device: torch.device, split: Split) -> Any:
    """Load this process's part of the model, with random weights."""
    config = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}
    config |= TRUE_SHAPE if device.type == "cuda" else SMALL_SHAPE
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        model, _ = load_split_model(str(path), split, worker, device=device, dtype=dtype, random_weights=True)
    return model


def training_step(model: Any, device: torch.device, batch: int, length: int, seed: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return make_step(model, inputs, mode="train", max_new_tokens=1)


def slowest_s(seconds: float) -> float:
    """Return the maximum over all ranks."""
    times: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(times, seconds)
    return float(max(times))


def timed(step: Callable[[], None], context: Context, device: torch.device, repeat: int) -> float:
    """Return seconds per step of the slowest rank."""
    with context():
        for _ in range(WARM_UP):
            step()
        _synchronize(device)
        distributed.barrier()
        started = time.perf_counter()
        for _ in range(repeat):
            step()
        _synchronize(device)
        seconds = (time.perf_counter() - started) / repeat
    return slowest_s(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def collectives(step: Callable[[], None], context: Context) -> int:
    """Count the collectives of one step in all process groups, with entering and leaving the context."""
    groups = list(distributed.distributed_c10d._world.pg_map)
    before = sum(group._get_sequence_number_for_group() for group in groups)
    with context():
        step()
    return sum(group._get_sequence_number_for_group() for group in groups) - before


def report(pairs: list[tuple[float, float]], counts: tuple[int, int], what: str) -> None:
    ratios = sorted(b / a for a, b in pairs)
    low, _, high = statistics.quantiles(ratios, n=4)
    bare, traced = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{what}\n")
    print("| bare ms | traced ms | ratio | quartiles | pairs | bound | collectives bare | traced |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {bare:.3f} | {traced:.3f} | **{statistics.median(ratios):.4f}** | {low:.4f} ... {high:.4f} | "
        f"{len(pairs)} | {BOUND} | {counts[0]} | {counts[1]} |"
    )


def measure(worker: Worker, device: torch.device, split: Split, arguments: argparse.Namespace) -> int:
    model = load(worker, device, split)
    step = training_step(model, device, arguments.batch, arguments.length, worker.rank // split.tp)

    def traced() -> moe_trace.MoETracer:
        return moe_trace.MoETracer(model)

    for context in (nullcontext, traced, nullcontext):
        timed(step, context, device, 1)
    counts = collectives(step, nullcontext), collectives(step, traced)
    gc.collect()
    gc.disable()
    pairs = []
    for i in range(arguments.pairs):
        order: list[Context] = [nullcontext, traced] if i % 2 == 0 else [traced, nullcontext]
        times = {context: timed(step, context, device, arguments.repeat) for context in order}
        pairs.append((times[nullcontext], times[traced]))
        if worker.is_rank0:  # shown even if the run is interrupted
            bare_ms, traced_ms = (1e3 * seconds for seconds in pairs[-1])
            print(
                f"pair {i + 1}: {bare_ms:.3f} ms, {traced_ms:.3f} ms, {traced_ms / bare_ms:.4f}", flush=True
            )
    if worker.is_rank0:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, gloo"
        sizes = f"fsdp {split.fsdp}, tp {split.tp}, ep {split.ep} ({split.ep_implementation})"
        report(pairs, counts, f"{machine}, {worker.world_size} ranks, {sizes}, torch {torch.__version__}")
    return 0 if counts[0] == counts[1] else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--ep-implementation", choices=EP_IMPLEMENTATIONS, default="all_to_all")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank")
    parser.add_argument(
        "--length", type=int, help="tokens per sequence (default: 2048 on a GPU, 128 on a CPU)"
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=3, help="steps of each half of a pair")
    arguments = parser.parse_args()
    arguments.length = arguments.length or (2048 if arguments.device == "cuda" else 128)
    split = Split(
        fsdp=arguments.fsdp, tp=arguments.tp, ep=arguments.ep, ep_implementation=arguments.ep_implementation
    )
    device = torch.device(arguments.device)
    require_support(split, device)
    with joined(arguments.device, split.processes) as worker:
        if arguments.device == "cuda":
            device = torch.device("cuda", worker.local_rank)
        return measure(worker, device, split, arguments)


if __name__ == "__main__":
    sys.exit(main())
