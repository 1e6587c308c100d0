#!/usr/bin/env python3
"""Compare `moe-trace report` on a big trace with HolisticTraceAnalysis and a bare parse: time and memory.

    python scripts/bench_read.py --mb 500 --out docs/performance_read.md

A real H200 trace from tests/data is grown by repetition (timestamps, correlations and ids continue), written
in Kineto's layout and merged again. Each contestant runs in a separate process, in turn.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from moe_trace.data.schema import Recording  # noqa: E402
from moe_trace.read.reader import read_recording  # noqa: E402
from moe_trace.timeline.merge import merge_recording  # noqa: E402

SOURCE = ROOT / "tests" / "data" / "h200" / "prefill_grouped_mm.pt.trace.json.gz"
STRIDE_US = 1_000_000.0
STRIDE_ID = 10_000_000
BARE = """
import sys
import msgspec
from moe_trace.data.trace_json.decoding import Event
class Trace(msgspec.Struct):
    traceEvents: list[Event]
msgspec.json.decode(open(sys.argv[1], "rb").read(), type=Trace)
"""
HTA = """
import sys, logging
logging.disable(logging.CRITICAL)
from hta.trace_analysis import TraceAnalysis
TraceAnalysis(trace_files={0: sys.argv[1]})
"""


@dataclass
class Run:
    """Wall seconds and peak memory of one process."""

    seconds: float
    peak_mb: float


def grown(events: list[dict[str, Any]], repeat: int) -> Iterator[bytes]:
    """Yield the events of one repetition in Kineto's layout."""
    for event in events:
        copy = dict(event)
        if event.get("ph") != "M":
            copy["ts"] = round(event["ts"] + repeat * STRIDE_US, 3)
        if "id" in event:
            copy["id"] = event["id"] + repeat * STRIDE_ID
        arguments = event.get("args")
        if isinstance(arguments, dict):
            copy["args"] = {
                key: value + repeat * STRIDE_ID if key in ("External id", "correlation") else value
                for key, value in arguments.items()
            }
        text = msgspec.json.format(msgspec.json.encode(copy), indent=2)
        yield b"  " + text.replace(b"\n", b"\n  ")


def write_big(path: Path, size_mb: int, more: Sequence[dict[str, Any]] = (), **changes: Any) -> Recording:
    """Grow the source to `size_mb` and merge the routing into it.

    Args:
        more: events that every repetition has in addition to the source's.
        changes: fields of the recording to replace, e.g. its rank.
    """
    trace = msgspec.json.decode(gzip.decompress(SOURCE.read_bytes()))
    recording = read_recording(SOURCE)
    plain = [e for e in trace["traceEvents"] if not (isinstance(e.get("pid"), int) and e["pid"] >= 9_000_000)]
    window = [e for e in plain if e.get("name") == "PyTorch Profiler (0)"]
    events = [*(e for e in plain if e not in window), *more]
    samples = []
    repeat = 0
    with path.open("wb") as file:
        head = {k: v for k, v in trace.items() if k not in ("traceEvents", "moe_trace")}
        file.write(msgspec.json.encode(head)[:-1] + b',\n"traceEvents": [\n')
        while file.tell() < size_mb * 1_000_000:
            file.write((b",\n" if repeat else b"") + b",\n".join(grown(events, repeat)))
            for sample in recording.samples:
                shift_ns = int(repeat * STRIDE_US * 1000)
                samples.append(
                    replace(
                        sample,
                        call=sample.call + repeat * 1000,
                        step=sample.step + repeat * 100,
                        host_start_ns=sample.host_start_ns + shift_ns,
                        host_end_ns=sample.host_end_ns + shift_ns,
                        placement=None,
                    )
                )
            repeat += 1
        file.write(b"\n]}\n")
    big = replace(recording, samples=tuple(samples), **changes)
    merge_recording(path, [big])
    return big


def measure(command: list[str]) -> Run:
    """Run a process to completion."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed with {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-hta", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.json"
        recording = write_big(path, arguments.mb)
        packed = Path(folder) / "big.json.gz"
        with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 2**22)
        table = bench(path, packed, arguments.rounds, with_hta=not arguments.without_hta)
        heading = (
            f"Trace: {path.stat().st_size / 1e6:.0f} MB, {len(recording.samples)} router calls, grown from a "
            f"real H200 trace. {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, "
            f"{time.strftime('%Y-%m-%d')}; medians of {arguments.rounds} rounds in turn, whole processes."
        )
    text = f"{heading}\n\n{table}\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def bench(path: Path, packed: Path, rounds: int, *, with_hta: bool) -> str:
    """Return the table. Contestants run in turn, so that other load affects all of them equally."""
    python = sys.executable
    contestants = {
        "python, nothing else": [python, "-c", "pass"],
        "one bare pass of msgspec (typed, whole file)": [python, "-c", BARE, str(path)],
        "moe-trace report, .json": [python, "-m", "moe_trace", "report", str(path)],
        "moe-trace report, .json.gz": [python, "-m", "moe_trace", "report", str(packed)],
    }
    if with_hta:
        contestants["HolisticTraceAnalysis, TraceAnalysis(...)"] = [python, "-c", HTA, str(path)]
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, command in contestants.items():
            runs[name].append(measure(command))
    seconds = {name: statistics.median(r.seconds for r in found) for name, found in runs.items()}
    peaks = {name: max(r.peak_mb for r in found) for name, found in runs.items()}
    report = "moe-trace report, .json"
    lines = ["| | seconds | peak MB | report (.json) in its terms |", "| --- | ---: | ---: | --- |"]
    for name in contestants:
        against = ""
        if name not in (report, "python, nothing else"):
            against = (
                f"{seconds[report] / seconds[name]:.2f} × time, {peaks[report] / peaks[name]:.2f} × memory"
            )
        lines.append(f"| {name} | {seconds[name]:.2f} | {peaks[name]:.0f} | {against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
