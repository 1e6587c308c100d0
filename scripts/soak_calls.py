#!/usr/bin/env python3
"""Record millions of router calls with one tracer, and check that resident memory stays constant.

    python scripts/soak_calls.py                # 10 million calls: minutes
    python scripts/soak_calls.py --calls 1e6

Prints a row after each tenth of the calls. The tracer's capacity is reached within the first tenth. The exit
status is 1 if memory then grows by more than the bound, or if a call is neither recorded nor counted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_hooks import LAYERS, Layers, fresh_outputs

import moe_trace


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=float, default=1e7)
    parser.add_argument("--growth-mib", type=float, default=16.0, help="largest allowed growth of memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, hidden = Layers().eval(), torch.zeros(1, 4)
    fresh_outputs(model)
    forwards = int(options.calls) // LAYERS
    capacity = min(100_000, int(options.calls) // 20)
    sizes: list[float] = []
    print("| router calls | MiB resident |\n| ---: | ---: |")
    with torch.no_grad(), moe_trace.MoETracer(model, capacity=capacity) as tracer:
        for tenth in range(10):
            for _ in range(forwards // 10):
                model(hidden)
            sizes.append(resident_mib())
            print(f"| {(tenth + 1) * (forwards // 10) * LAYERS:,} | {sizes[-1]:.1f} |", flush=True)
    lost, kept = tracer.recording().lost, len(tracer.samples())
    seen = sum(lost.calls_seen.values())
    print(f"\n{seen:,} calls seen = {kept:,} kept + {lost.overwritten:,} dropped for capacity={capacity:,}")
    growth = max(sizes[1:]) - sizes[0]
    print(f"grew by {growth:.1f} MiB after the first tenth (bound {options.growth_mib:g})")
    return int(growth > options.growth_mib or seen != kept + lost.overwritten)


if __name__ == "__main__":
    sys.exit(main())
