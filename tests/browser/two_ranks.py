"""Profile the demo model as one of two gloo processes: python two_ranks.py RANK FOLDER STORE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import moe_trace
from moe_trace.demo import DEMO_PROMPTS, load_demo_model

WORLD_SIZE = 2
STEPS = 6


def main(rank: int, folder: Path, store: Path) -> None:
    """Writes the trace of one rank; the second rank has twice the tokens."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE
    )
    model, tokenizer = load_demo_model()
    texts = list(DEMO_PROMPTS.values())[: 1 + rank]
    inputs = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=64, truncation=True)
    handler = moe_trace.tensorboard_trace_handler(folder, worker_name=f"rank{rank}")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        moe_trace.profile(model, activities=activities, on_trace_ready=handler) as prof,
        torch.inference_mode(),
    ):
        for _ in range(STEPS):
            model(**inputs)
            prof.step()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
