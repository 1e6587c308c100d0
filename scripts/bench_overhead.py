#!/usr/bin/env python3
"""What moe_trace costs, as ratios within one run: A B A B ..., medians, spread.

    python scripts/bench_overhead.py                    # a small model on the CPU
    python scripts/bench_overhead.py --device cuda      # OLMoE-1B-7B's true shape, random weights
    python scripts/bench_overhead.py --only prefill,decode --markdown table.md

Each pair runs the same step bare and traced, one after the other; a row is the median of the pairs'
ratios, with their quartiles. "profiler" rows compare a step under torch.profiler with and without us.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moe_trace

Step = Callable[[], Any]
TRUE_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "max_position_embeddings": 16384,
}
SMALL_SHAPE = TRUE_SHAPE | {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    workload: str
    bare_ms: float
    traced_ms: float
    ratio: float
    low: float
    high: float
    pairs: int
    bound: float | None


class Bench:
    """The model and how to time a step on its device."""

    def __init__(self, device: str, pairs: int) -> None:
        self.device, self.pairs = device, pairs
        self.on_gpu = device == "cuda"
        torch.manual_seed(0)
        with torch.device(device):
            self.model = OlmoeForCausalLM(OlmoeConfig(**(TRUE_SHAPE if self.on_gpu else SMALL_SHAPE)))
        self.model.to(torch.bfloat16 if self.on_gpu else torch.float32).eval()
        self.rows: list[Row] = []

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        return torch.randint(0, vocabulary, (batch, length), generator=generator).to(self.device)

    def seconds(self, step: Step) -> float:
        self.synchronize()
        started = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def compare(
        self,
        workload: str,
        step: Step,
        *,
        bare: Callable[[], Any],
        traced: Callable[[], Any],
        bound: float | None,
        repeat: int = 1,
    ) -> None:
        """Time `repeat` steps inside each context, in turn, and keep the pairs' ratios."""

        def steps() -> None:
            for _ in range(repeat):
                step()

        def one(context: Callable[[], Any]) -> float:
            with context():
                step()  # the first step inside a context pays for hooks being installed
                return self.seconds(steps) / repeat

        for context in (bare, traced):
            one(context)
        gc.collect()
        gc.disable()
        pairs = []
        for i in range(self.pairs):
            order = (bare, traced) if i % 2 == 0 else (traced, bare)
            times = {context: one(context) for context in order}
            pairs.append((times[bare], times[traced]))
        gc.enable()
        ratios = sorted(b / a for a, b in pairs)
        quartiles = statistics.quantiles(ratios, n=4)
        row = Row(
            workload,
            1e3 * statistics.median(a for a, _ in pairs),
            1e3 * statistics.median(b for _, b in pairs),
            statistics.median(ratios),
            quartiles[0],
            quartiles[2],
            len(pairs),
            bound,
        )
        self.rows.append(row)
        print(markdown_row(row), flush=True)


@contextmanager
def nothing() -> Iterator[None]:
    yield


def plain_profiler(bench: Bench) -> Callable[[], Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    return lambda: torch.profiler.profile(activities=activities)


def traced_profiler(bench: Bench) -> Callable[[], Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    return lambda: moe_trace.profile(bench.model, activities=activities)


def hooked(bench: Bench, **arguments: Any) -> Callable[[], Any]:
    return lambda: moe_trace.MoETracer(bench.model, **arguments)


def prefill_step(bench: Bench) -> Step:
    ids = bench.tokens(1, 8192) if bench.on_gpu else bench.tokens(1, 512)

    @torch.no_grad()
    def step() -> None:
        bench.model(ids, logits_to_keep=1)

    return step


def decode_step(bench: Bench, batch: int = 1) -> Step:
    """The cache grows by a token a step; pairs are neighbours, so both halves see the same growth."""
    with torch.no_grad():
        cache = bench.model(bench.tokens(batch, 128), use_cache=True).past_key_values
    token = bench.tokens(batch, 1)

    @torch.no_grad()
    def step() -> None:
        bench.model(token, past_key_values=cache)

    return step


def prefill(bench: Bench) -> None:
    step, name = prefill_step(bench), "8192-token forward" if bench.on_gpu else "512-token forward"
    bench.compare(f"{name}, no profiler", step, bare=nothing, traced=hooked(bench), bound=1.003, repeat=3)
    bench.compare(
        f"{name}, profiler", step, bare=plain_profiler(bench), traced=traced_profiler(bench), bound=1.005
    )


def decode(bench: Bench) -> None:
    step = decode_step(bench)
    bench.compare("eager decode, no profiler", step, bare=nothing, traced=hooked(bench), bound=1.02, repeat=8)
    bench.compare(
        "eager decode, profiler",
        step,
        bare=plain_profiler(bench),
        traced=traced_profiler(bench),
        bound=1.03,
        repeat=8,
    )


def idle(bench: Bench) -> None:
    """Sampling is off for the step: the cost per router call, from a decode step."""
    step = decode_step(bench)
    off = hooked(bench, warmup=10**9)
    bench.compare("decode, sampling off", step, bare=nothing, traced=off, bound=None, repeat=8)
    row = bench.rows[-1]
    per_call = (row.ratio - 1) * row.bare_ms * 1e3 / bench.model.config.num_hidden_layers
    print(f"  idle cost {per_call:.2f} us a router call (bound 2 us)")


def merge(bench: Bench) -> None:
    """Merging against Kineto's own export, on a trace of several steps."""
    from moe_trace.timeline.merge import merge_in_place

    step = prefill_step(bench) if bench.on_gpu else decode_step(bench)
    prof = traced_profiler(bench)()
    with prof:
        for _ in range(40):
            step()
    recording = prof.tracer.recording()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        exported = bench.seconds(lambda: torch.profiler.profile.export_chrome_trace(prof, str(path)))
        size = path.stat().st_size / 1e6
        merged = sorted(bench.seconds(lambda: merge_in_place(path, [recording])) for _ in range(5))[2]
    print(
        f"  trace of {size:.0f} MB: Kineto's export {exported:.2f} s, merge {merged:.3f} s, "
        f"{100 * merged / exported:.1f} % of it (bound 10 %)"
    )


_MEMORY_SCRIPT = """
import sys
from pathlib import Path
from moe_trace.reader import read_recording
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
    """Peak memory of merging into a real H200 trace grown to 500 MB, in a process of its own (Linux)."""
    source = Path(__file__).resolve().parents[1] / "tests/data/h200/prefill_grouped_mm.pt.trace.json.gz"
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.json"
        grow_trace(gzip.decompress(source.read_bytes()), large, size=500 * 10**6)
        command = [sys.executable, "-c", _MEMORY_SCRIPT, str(source), str(large)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=source.parents[3])
        print(
            f"  merging into {large.stat().st_size / 1e6:.0f} MB: {float(result.stdout):.1f} MiB more memory "
            "at the peak (bound 64 MiB)"
        )


def grow_trace(trace: bytes, target: Path, size: int) -> None:
    """Repeat a merged trace's events, without what merging added, until the file has about `size` bytes."""
    splice = json.loads(trace)["moe_trace"]["splice"]
    start = trace.index(b"[", trace.index(b'"traceEvents"')) + 1
    events = trace[start : splice["events_offset"]]
    rest = trace[splice["events_offset"] + splice["events_bytes"] : splice["key_offset"]]
    with target.open("wb") as file:
        file.write(trace[:start] + events)
        for _ in range(size // len(events)):
            file.write(b"," + events)
        file.write(rest + trace[len(trace) - splice["suffix_bytes"] :])


WORKLOADS = {
    "prefill": prefill,
    "decode": decode,
    "idle": idle,
    "merge": merge,
    "merge_memory": merge_memory,
}


def markdown_row(row: Row) -> str:
    bound = f"{row.bound:.3f}" if row.bound else "-"
    return (
        f"| {row.workload} | {row.bare_ms:.3f} | {row.traced_ms:.3f} | **{row.ratio:.4f}** | "
        f"{row.low:.4f} ... {row.high:.4f} | {row.pairs} | {bound} |"
    )


def heading(bench: Bench) -> str:
    machine = torch.cuda.get_device_name() if bench.on_gpu else platform.processor() or platform.machine()
    return (
        f"{date.today()}, {machine}, torch {torch.__version__}\n\n"
        "| workload | bare ms | traced ms | ratio | quartiles | pairs | bound |\n"
        "|---|---|---|---|---|---|---|"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, comma-separated")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    bench = Bench(arguments.device, arguments.pairs)
    print(heading(bench), flush=True)
    for name in arguments.only.split(","):
        WORKLOADS[name](bench)
    if arguments.markdown:
        rows = "\n".join(map(markdown_row, bench.rows))
        arguments.markdown.write_text(f"{heading(bench)}\n{rows}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
