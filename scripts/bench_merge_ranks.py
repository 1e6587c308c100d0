#!/usr/bin/env python3
"""Measure time and memory of `moe-trace merge` on big traces of two ranks, and of reading its output.

    python scripts/bench_merge_ranks.py --mb 250

A real H200 trace from tests/data is grown by repetition, once for each rank. Each repetition contains one
all-reduce that both ranks share. Rank 1's clock has a known offset. Each command runs in a separate process.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from bench_read import SOURCE, Run, measure, write_big  # noqa: E402

from moe_trace.data.schema import Parallel  # noqa: E402
from moe_trace.read.reader import read_summary  # noqa: E402

RANKS = 2
CLOCK_OFF_US = 1234.5


def shared_collective(rank: int) -> list[dict[str, Any]]:
    """Return an all-reduce with its launch and kernel, on the thread and at the start of a router."""
    events = msgspec.json.decode(gzip.decompress(SOURCE.read_bytes()))["traceEvents"]
    router = next(e for e in events if str(e.get("name")).startswith("moe.router/") and e["ph"] == "X")
    place = {"pid": router["pid"], "tid": router["tid"]}
    start = router["ts"] - rank * CLOCK_OFF_US
    arguments = {
        "Collective name": "allreduce",
        "In msg nelems": 1024,
        "Out msg nelems": 1024,
        "dtype": "BFloat16",
        "Group size": RANKS,
        "Process Group Name": "0",
        "Process Group Ranks": "[0, 1]",
    }
    link = {"correlation": 9_999_999}
    return [
        {"ph": "X", "cat": cat, "name": name, "ts": start + offset, "dur": duration, **where, "args": more}
        for cat, name, offset, duration, where, more in (
            ("cpu_op", "record_param_comms", 1.0, 3.0, place, {"External id": 9_999_999, **arguments}),
            ("cuda_runtime", "cudaLaunchKernel", 2.0, 1.0, place, link),
            ("kernel", "ncclDevKernel_AllReduce", 50.0, 20.0, {"pid": 0, "tid": 77}, {**link, **arguments}),
        )
    ]


def write_ranks(folder: Path, size_mb: int) -> None:
    """Write the traces of both ranks."""
    for rank in range(RANKS):
        write_big(
            folder / f"rank{rank}.pt.trace.json",
            size_mb,
            shared_collective(rank),
            rank=rank,
            world_size=RANKS,
            parallel=Parallel(mesh={"dp_replicate": RANKS}, token_ranks=(rank,)),
        )


def bench(folder: Path, out: Path, rounds: int) -> str:
    """Return the table: median seconds and largest peak memory."""
    command = [sys.executable, "-m", "moe_trace"]
    plain, packed = out / "merged.json", out / "merged.json.gz"
    contestants = {
        "moe-trace merge, to .json": [*command, "merge", folder, "--out", plain, "--force"],
        "moe-trace merge, to .json.gz": [*command, "merge", folder, "--out", packed, "--force"],
        "moe-trace report, of the folder": [*command, "report", folder],
        "moe-trace report, of the merged .json": [*command, "report", plain],
    }
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, words in contestants.items():
            runs[name].append(measure([str(word) for word in words]))
    lines = ["| | seconds | peak MB |", "| --- | ---: | ---: |"]
    for name, found in runs.items():
        seconds = statistics.median(run.seconds for run in found)
        lines.append(f"| {name} | {seconds:.1f} | {max(run.peak_mb for run in found):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=250, help="size of each rank's trace")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch, "ranks"), Path(scratch, "out")
        folder.mkdir()
        out.mkdir()
        write_ranks(folder, arguments.mb)
        sizes = [file.stat().st_size / 1e6 for file in sorted(folder.iterdir())]
        print(
            f"Traces: {' and '.join(f'{size:.0f} MB' for size in sizes)}, grown from a real H200 trace. "
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"{time.strftime('%Y-%m-%d')}; medians of {arguments.rounds} rounds in turn, whole processes.\n"
        )
        print(bench(folder, out, arguments.rounds))
        report = read_summary(out / "merged.json").ranks
        assert report is not None
        found = report.alignment
        print(
            f"\nRank 1's clock was off by {CLOCK_OFF_US} µs; found {found.offset_ns[1] / 1000} µs by "
            f"{found.collectives} collectives, residual {found.after}."
        )


if __name__ == "__main__":
    main()
