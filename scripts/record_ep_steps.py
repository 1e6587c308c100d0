#!/usr/bin/env python3
"""Record expert-parallel forwards of the demo model, with different text for each step and rank.

    torchrun --nproc-per-node 2 scripts/record_ep_steps.py --out runs/ep
    torchrun --nproc-per-node 2 scripts/record_ep_steps.py --device cuda --out runs/ep_gpu

Every rank has its own tokens and E / N of the experts. Slots are exchanged by an all-to-all, which needs
transformers with `DistributedConfig(ep_implementation=...)`. Steps use prose, code, data and pages in turn,
so that they differ like the requests of a server. `scripts/check_placement.py` reads the folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import distributed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import moe_trace  # noqa: E402
from moe_trace.demo import load_demo_model  # noqa: E402

KINDS = ("docs/*.md", "moe_trace/**/*.py", "**/*.json", "moe_trace/**/static/**/*.*")


def texts(kind: int, length: int) -> str:
    """Return the concatenated files of one kind, at least `length` characters."""
    found = ""
    for path in sorted(p for p in ROOT.glob(KINDS[kind]) if p.is_file() and ".venv" not in p.parts):
        found += path.read_text("utf-8", errors="replace")
        if len(found) >= length:
            break
    return found


def batch_of(step: int, rank: int, world: int, rows: int, tokens: int) -> torch.Tensor:
    """Return [rows, tokens] byte ids. No two steps or ranks share text."""
    size = rows * tokens
    place = (step // len(KINDS) * world + rank) * size
    text = texts(step % len(KINDS), place + size).encode("ascii", "replace")
    ids = [byte + 3 for byte in text[place : place + size].ljust(size, b" ")]
    return torch.tensor(ids).reshape(rows, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    from transformers import DistributedConfig

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = f"cuda:{os.environ['LOCAL_RANK']}" if arguments.device == "cuda" else "cpu"
    config = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="all_to_all")
    model, _ = load_demo_model(device, distributed_config=config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model(batch_of(0, rank, world, 1, 16).to(device))  # FSDP creates its groups in the first forward
        with moe_trace.profile(model, record_shapes=True) as prof:
            for step in range(arguments.steps):
                model(batch_of(step, rank, world, arguments.rows, arguments.tokens).to(device))
                prof.step()
    prof.export_chrome_trace(str(arguments.out / f"rank{rank}.pt.trace.json.gz"))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
