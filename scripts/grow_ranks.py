#!/usr/bin/env python3
"""Measure reports over many ranks, from their traces and from reduced files.

    python scripts/grow_ranks.py                    # 8, 64, 256 ranks of two real ones
    python scripts/grow_ranks.py --ranks 32 --source tests/data/h100/prefill_decode_16_layers.pt.trace.json.gz

Rank r of the run is trace r % n of the n given traces, with its own rank and groups and unchanged events.
Three reports of each run are timed as whole processes: on one core, on all cores, and without the traces.
Their figures must be bitwise equal; otherwise the exit code is 1. Memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_trace.read.file.folder import find_traces  # noqa: E402

SOURCE = ROOT / "tests/data/gloo_ep2"


def grow(source: Path, folder: Path, ranks: int) -> None:
    """Write the traces of `ranks` ranks."""
    given = [json.loads(gzip.decompress(path.read_bytes())) for path in find_traces(source)]
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        trace = dict(given[rank % len(given)])
        first = rank - rank % len(given)
        carrier = next((e for e in trace["traceEvents"] if "moe_trace" in e.get("args", {})), None)
        recording = as_rank((carrier["args"] if carrier else trace)["moe_trace"], rank, first, ranks)
        if carrier is None:
            trace["moe_trace"] = recording
        else:
            args = {**carrier["args"], "moe_trace": recording}
            events = [e if e is not carrier else {**e, "args": args} for e in trace["traceEvents"]]
            trace["traceEvents"] = events
        info = trace.get("distributedInfo", {})
        trace["distributedInfo"] = {**info, "rank": rank, "world_size": ranks, "pg_config": []}
        text = json.dumps(trace).encode()
        (folder / f"rank{rank:03}.pt.trace.json.gz").write_bytes(gzip.compress(text, 1, mtime=0))


def as_rank(recording: dict[str, Any], rank: int, first: int, ranks: int) -> dict[str, Any]:
    """Return the recording as one rank of a larger run, whose groups begin at rank `first`."""
    parallel = recording["parallel"] or {"mesh": {}, "token_ranks": [0], "expert_ranks": []}
    groups = {name: [first + r for r in parallel[name]] for name in ("token_ranks", "expert_ranks")}
    sizes = {**parallel["mesh"], "dp_replicate": ranks // max(1, len(parallel["expert_ranks"]))}
    whole = {"expert_exchange": None, **parallel, "mesh": sizes, **groups}
    return {**recording, "rank": rank, "world_size": ranks, "parallel": whole}


def report(folder: Path, cores: set[int]) -> tuple[dict[str, Any], float, float]:
    """Return the figures, the seconds, and the MB of the largest process."""
    command = [sys.executable, "-m", "moe_trace", "report", str(folder), "--format", "json"]
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, env=environment(), preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, *map(resident_mb, family(process.pid)))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        assert process.returncode == 0, process.returncode
        out.seek(0)
        found = json.load(out)
    found["notes"] = [note for note in found["notes"] if "traces are gone" not in note]
    return found, seconds, peak


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def family(pid: int) -> Iterator[int]:
    """Yield the ids of the process and its children."""
    yield pid
    try:
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return


def resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(peak.split()[1]) / 1000


def size_mb(files: Sequence[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def measure(source: Path, ranks: int) -> bool:
    """Print one row; return whether all figures agree."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        grow(source, folder, ranks)
        traces, cores = find_traces(folder), os.sched_getaffinity(0)
        packed = size_mb(traces)
        one = report(folder, {min(cores)})
        many = report(folder, cores)
        started = time.perf_counter()
        command = [sys.executable, "-m", "moe_trace", "reduce", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
        reducing = time.perf_counter() - started
        for trace in traces:
            trace.unlink()
        gone = report(folder, cores)
        small = size_mb(list(folder.glob("*.moe_trace")))
    times = " | ".join(f"{seconds:.1f} | {peak:.0f}" for _, seconds, peak in (one, many, gone))
    same = one[0] == many[0] == gone[0]
    print(f"| {ranks} | {packed:.1f} | {small:.1f} | {reducing:.1f} | {times} | {'yes' if same else 'NO'} |")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores; sizes in MB, times in s")
    print("| ranks | traces | reduced | to reduce | one process | MB | all cores | MB | gone | MB | same |")
    return 0 if all([measure(arguments.source, ranks) for ranks in arguments.ranks]) else 1


if __name__ == "__main__":
    sys.exit(main())
