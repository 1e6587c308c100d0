#!/usr/bin/env python3
"""Measure the overhead of moe_trace as ratios of alternating bare and traced steps within one run.

    python scripts/bench_overhead.py                    # a small model on the CPU
    python scripts/bench_overhead.py --device cuda      # OLMoE-1B-7B's true shape, random weights
    python scripts/bench_overhead.py --only prefill,decode1,usual --markdown table.md

Each pair runs the same step bare and traced, one after the other. A row is the median of the pairs' ratios
with their quartiles. "profiler" rows compare steps under torch.profiler with and without moe_trace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_eager
import bench_graphs
import bench_merge
from bench_pairs import Bench, heading, markdown_row

WORKLOADS: dict[str, Callable[[Bench], None]] = {
    **bench_eager.WORKLOADS,
    **bench_graphs.WORKLOADS,
    **bench_merge.WORKLOADS,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, comma-separated")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    bench = Bench(arguments.device, arguments.pairs)
    print(heading(bench), flush=True)
    for name in arguments.only.split(","):
        WORKLOADS[name](bench)
    if arguments.markdown:
        rows = "\n".join([*map(markdown_row, bench.rows), "", *bench.notes])
        arguments.markdown.write_text(f"{heading(bench)}\n{rows}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
