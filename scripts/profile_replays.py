#!/usr/bin/env python3
"""Profile a compiled decode step kernel by kernel, with the tracer and without.

    python scripts/profile_replays.py --out replays            # needs a GPU
    python scripts/profile_replays.py --out replays --batch 64

Compiles the model of `bench_overhead.py` bare, traced, and as two controls: bare again, and bare with one
more small output ("moved"), which shifts the memory of everything that follows. Differences between bare and
the controls are not a cost of the tracer. Writes one file for each, with the kernels of a replay in order and
the medians of their durations. Prints the sum over all kernels and that of the kernel that takes the most
time (for OLMoE, the experts' grouped product).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from bench_graphs import CompiledDecode
from bench_pairs import Bench

import moe_trace

REPLAYS = CompiledDecode.STEPS


def kernels(forward: Any, step: Any, file: Path) -> list[list[dict[str, Any]]]:
    """Return the kernels of each replay in the order of execution."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with forward(), torch.profiler.profile(activities=activities) as prof:
        for _ in range(REPLAYS):
            step()
        torch.cuda.synchronize()
    prof.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    replays: dict[int, list[dict[str, Any]]] = {}
    launches = {e["args"]["correlation"] for e in events if e.get("name") == "cudaGraphLaunch"}
    for event in sorted(on_device, key=lambda e: e["ts"]):
        if event["args"]["correlation"] in launches:
            replays.setdefault(event["args"]["correlation"], []).append(event)
    return list(replays.values())


def describe(replays: list[list[dict[str, Any]]]) -> tuple[str, list[str]]:
    """Return the totals, and a line for each kernel."""
    lengths = {len(replay) for replay in replays}
    spans = [replay[-1]["ts"] + replay[-1]["dur"] - replay[0]["ts"] for replay in replays]
    busy = [sum(e["dur"] for e in replay) for replay in replays]
    lines, sums = [], Counter[str]()
    for together in zip(*(replay for replay in replays if len(replay) == max(lengths)), strict=True):
        name, duration = together[0]["name"], statistics.median(e["dur"] for e in together)
        lines.append(f"{duration:8.2f} {name[:110]}")
        sums[name] += duration
    return (
        f"{sorted(lengths)} kernels, span {statistics.median(spans):.1f} us, "
        f"busy {statistics.median(busy):.1f} us, of which the largest {max(sums.values()):.1f} us",
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the lists")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench("cuda", arguments.pairs)
    decode = CompiledDecode(bench, arguments.batch)
    ways = {
        "bare": decode.compiled(),
        "again": decode.compiled(),
        "moved": decode.compiled(also=", (tokens + 1).float()"),
    }
    with moe_trace.MoETracer(bench.model):
        ways["traced"] = decode.compiled()
        for name, forward in ways.items():
            trace = arguments.out / f"{name}.json"
            totals, lines = describe(kernels(decode.using(forward), decode.step, trace))
            (arguments.out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            trace.unlink()
            print(f"{name}: {totals}", flush=True)
        bare = decode.using(ways.pop("bare"))
        for name, forward in ways.items():
            traced = decode.using(forward)
            bench.compare(name, decode.step, bare=bare, traced=traced, bound=None, repeat=decode.STEPS)


if __name__ == "__main__":
    main()
