#!/usr/bin/env python3
"""Measure the overhead of recording routes as ratios of alternating forwards within one run.

    python scripts/bench_routes_cost.py                  # a small model on the CPU
    python scripts/bench_routes_cost.py --device cuda    # OLMoE-1B-7B's true shape, random weights

Each pair runs the same forwards without a tracer and with one, in turn; see `bench_overhead.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_pairs import Bench, decode_step, heading, hooked, nothing, on_one_core, prefill_step

from moe_trace import Routes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=11)
    arguments = parser.parse_args()
    bench = Bench(arguments.device, arguments.pairs)
    print(heading(bench), flush=True)
    name, step = ("8192" if bench.on_gpu else "512") + "-token forward", prefill_step(bench)
    ways = {
        "no routes": (False, 1.002),
        "routes": (Routes(), 1.003),
        "routes, weights, token ids": (Routes(weights=True, token_ids=True), None),
    }
    for way, (routes, bound) in ways.items():
        # Enough forwards for several copies to the host.
        bench.compare(
            f"{name}, {way}", step, bare=nothing, traced=hooked(bench, routes=routes), bound=bound, repeat=24
        )
    with on_one_core():
        for way, (routes, _) in ways.items():
            traced = hooked(bench, routes=routes)
            bench.compare(
                f"eager decode, {way}", decode_step(bench), bare=nothing, traced=traced, bound=None, repeat=64
            )


if __name__ == "__main__":
    main()
