#!/usr/bin/env python3
"""Measure the compile time of provenance tracking: OLMoE-1B-7B's layers with and without it.

    python scripts/bench_compile_notes.py --pairs 5

Each pair compiles the same model twice under a tracer, once with provenance tracking and once without.
Caches are off. Prints the ratio of each pair as it is measured, then the median and the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch._inductor import config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record_gpu_traces import tokens, true_shape
from transformers import OlmoeForCausalLM

import moe_trace
from moe_trace.record.graphs.launch_lists import LaunchLists


@torch.no_grad()
def seconds(model: OlmoeForCausalLM, *, notes: bool) -> float:
    """Return the time of the first compiled forward, including compilation."""
    torch._dynamo.reset()
    ids = tokens(4, 16)
    watch = LaunchLists.watch if notes else lambda self: None
    with patch.object(LaunchLists, "watch", watch), moe_trace.MoETracer(model) as tracer:
        began = time.perf_counter()
        torch.compile(model)(ids, use_cache=False)
        torch.cuda.synchronize()
        taken = time.perf_counter() - began
    assert bool(tracer.recording().compiled_graphs) == notes
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    with torch.device("cuda"):
        model = OlmoeForCausalLM(true_shape(arguments.layers)).to(torch.bfloat16).eval()
    ratios = []
    with config.patch(force_disable_caches=True):
        seconds(model, notes=False)  # the first run also compiles code that the process then reuses
        for pair in range(arguments.pairs):
            order = (True, False) if pair % 2 else (False, True)
            taken = {notes: seconds(model, notes=notes) for notes in order}
            ratios.append(taken[True] / taken[False])
            print(f"pair {pair}: {taken[False]:.2f} s, with notes {taken[True]:.2f} s", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{torch.cuda.get_device_name()}: with notes x {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
