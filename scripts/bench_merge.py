"""Workloads of `bench_overhead.py`: time and memory of merging the recording into a trace."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_pairs import Bench, decode_step, prefill_step, traced_profiler

BOUND = 0.15
SIZES_MB = (150, 500)
REPEATS = 5


def merge(bench: Bench) -> None:
    """Compare the CPU time of merging with that of Kineto's export, on traces of two sizes."""
    steps = 20
    size_mb, _ = _merge_steps(bench, steps)  # measures the size of a step's trace
    for wanted_mb in SIZES_MB:
        _, note = _merge_steps(bench, max(1, round(steps * wanted_mb / size_mb)))
        bench.note(note)


def _merge_steps(bench: Bench, steps: int) -> tuple[float, str]:
    """Return the size of the trace in MB and a line on the time of merging into it."""
    from moe_trace.timeline.merge import merge_in_place

    step = prefill_step(bench) if bench.on_gpu else decode_step(bench)
    prof = traced_profiler(bench)()
    with prof:
        for _ in range(steps):
            step()
    recording = prof.tracer.recording()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        exported = _cpu_seconds(lambda: torch.profiler.profile.export_chrome_trace(prof, str(path)))
        size_mb = path.stat().st_size / 1e6
        merged = []
        for i in range(REPEATS):
            fresh = shutil.copyfile(path, path.with_name(f"{i}.json"))  # contains no earlier merge to remove
            merged.append(_cpu_seconds(lambda fresh=fresh: merge_in_place(fresh, [recording])))
            fresh.unlink()
        merged.sort()
        middle, low, high = merged[REPEATS // 2], merged[0], merged[-1]
    return size_mb, (
        f"trace of {size_mb:.0f} MB, {len(recording.samples)} calls: Kineto's export {exported:.2f} s, merge "
        f"{middle:.3f} s ({low:.3f} ... {high:.3f}), {middle / exported:.3f} of it (bound {BOUND})"
    )


def _cpu_seconds(work: Callable[[], None]) -> float:
    """Return CPU time, on which other load has little influence."""
    started = time.process_time()
    work()
    return time.process_time() - started


_MEMORY_SCRIPT = """
import sys
from pathlib import Path
from moe_trace.read.reader import read_recording
from moe_trace.timeline.merge import merge_in_place
small, large = map(Path, sys.argv[1:])
recording = read_recording(small)
def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
merge_in_place(large, [recording])
print(status("VmHWM") - before)
"""


def merge_memory(bench: Bench) -> None:
    """Measure peak memory of merging into a real H200 trace grown to 500 MB, in its own process (Linux)."""
    source = Path(__file__).resolve().parents[1] / "tests/data/h200/prefill_grouped_mm.pt.trace.json.gz"
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.json"
        grow_trace(gzip.decompress(source.read_bytes()), large, size=500 * 10**6)
        command = [sys.executable, "-c", _MEMORY_SCRIPT, str(source), str(large)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=source.parents[3])
        bench.note(
            f"merging into {large.stat().st_size / 1e6:.0f} MB: {float(result.stdout):.1f} MiB more memory "
            "at the peak (bound 64 MiB)"
        )


def grow_trace(trace: bytes, target: Path, size: int) -> None:
    """Repeat a merged trace's events, without what merging added, until the file has about `size` bytes."""
    splice = json.loads(trace)["moe_trace"]["splice"]  # an older release wrote these files
    start = trace.index(b"[", trace.index(b'"traceEvents"')) + 1
    events = trace[start : splice["events_offset"]]
    rest = trace[splice["events_offset"] + splice["events_bytes"] : splice["key_offset"]]
    with target.open("wb") as file:
        file.write(trace[:start] + events)
        for _ in range(size // len(events)):
            file.write(b"," + events)
        file.write(rest + trace[len(trace) - splice["suffix_bytes"] :])


WORKLOADS = {"merge": merge, "merge_memory": merge_memory}
