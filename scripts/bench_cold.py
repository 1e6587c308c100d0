#!/usr/bin/env python3
"""Measure the first recorded step of a fresh process against the second, in alternating processes.

    python scripts/bench_cold.py  # OLMoE-1B-7B's true shape on the GPU
    python scripts/bench_cold.py --minutes 8 --runs cold.jsonl  # a part; run it again to continue
    python scripts/bench_cold.py --device cpu --pairs 2  # a smoke test: a small model

Every process starts with empty caches of Triton and Inductor. It measures the time of the first step divided
by that of the second, bare (torch.profiler alone) or traced (with moe_trace). The result is the ratio of
traced to bare. Each step has its own profiler session, whose trace gives the duration of our longest range.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
WORKLOADS = ("forward", "forward_warm", "decode", "training", "scalars", "compiled")
BOUND = 1.05
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--pairs", type=int, default=15, help="processes of each kind")
    parser.add_argument("--layers", type=int, help="by default 16 on a GPU, 2 on a CPU")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--minutes", type=float, help="start no pair that would end after this time")
    parser.add_argument("--runs", type=Path, help="keep each pair in this file, and continue from its pairs")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--child", nargs=2, metavar=("WORKLOAD", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or (16 if arguments.device == "cuda" else 2)
    if arguments.child:
        print(json.dumps(Child(arguments.device, arguments.layers, *arguments.child).run()))
        return
    found = measure(arguments)
    table = [heading(found, arguments.layers)]
    table += [
        row(workload, part, ways)
        for workload, ways in found.items()
        if ways["bare"]
        for part in ways["bare"][0]["parts"]
    ]
    print("\n".join(table), flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(table) + "\n", encoding="utf-8")


# -- the parent ----------------------------------------------------------------------------------------------

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""Workload -> way -> one result per process. The two lists of a workload have paired entries."""


def measure(arguments: argparse.Namespace) -> Runs:
    """Measure pairs of each workload in turn until there are enough or the time is over."""
    kept = Kept(arguments)
    started = time.monotonic()
    longest = dict.fromkeys(arguments.only, 0.0)
    for i in range(arguments.pairs):
        for workload in arguments.only:
            if i < len(kept.runs[workload]["bare"]):
                continue
            begun = time.monotonic()
            if arguments.minutes and begun - started + longest[workload] > 60 * arguments.minutes:
                print(f"# {arguments.minutes:g} minutes are over; run it again for more pairs", flush=True)
                return kept.runs
            order = ("bare", "traced") if i % 2 == 0 else ("traced", "bare")
            kept.add(workload, {way: in_fresh_process(arguments, workload, way) for way in order})
            longest[workload] = max(longest[workload], time.monotonic() - begun)
    return kept.runs


class Kept:
    """Pairs measured so far, including those of earlier runs from a file with one pair per line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._file: Path | None = arguments.runs
        self._key = [arguments.device, arguments.layers]
        self.runs: Runs = {workload: {"bare": [], "traced": []} for workload in arguments.only}
        for line in self._file.read_text().splitlines() if self._file and self._file.exists() else ():
            *key, workload, pair = json.loads(line)
            if key == self._key and workload in self.runs:
                self._take(workload, pair)

    def _take(self, workload: str, pair: dict[str, dict[str, Any]]) -> None:
        for way, runs in self.runs[workload].items():
            runs.append(pair[way])
        print(f"{workload}, pair {len(runs)}: {told(pair)}", flush=True)

    def add(self, workload: str, pair: dict[str, dict[str, Any]]) -> None:
        self._take(workload, pair)
        if self._file:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([*self._key, workload, pair]) + "\n")


def told(pair: dict[str, dict[str, Any]]) -> str:
    """Format the measurements of one pair."""
    return "; ".join(
        f"{part}: {first_over_second(pair['traced'], part) / first_over_second(bare, part):.3f}"
        f" ({first_over_second(bare, part):.2f} bare), ours "
        + " / ".join(f"{value:.2f}" for value in pair["traced"]["own_ms"][part])
        + " ms"
        for bare in [pair["bare"]]
        for part in bare["parts"]
    )


def in_fresh_process(arguments: argparse.Namespace, workload: str, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", arguments.device, "--layers", str(arguments.layers)]
    with tempfile.TemporaryDirectory() as empty:
        caches = {name: f"{empty}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        done = subprocess.run(
            [*command, "--child", workload, way], env=os.environ | caches, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(f"{workload}, {way}: {done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(workload: str, part: str, found: dict[str, list[dict[str, Any]]]) -> str:
    ratios = {way: [first_over_second(run, part) for run in runs] for way, runs in found.items()}
    pairs = sorted(b / a for a, b in zip(ratios["bare"], ratios["traced"], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else 3 * pairs

    def median_ms(way: str, which: int) -> float:
        return statistics.median(1e3 * run["parts"][part][which] for run in found[way])

    own = [statistics.median(run["own_ms"][part][which] for run in found["traced"]) for which in (0, 1)]
    start = statistics.median(run["start_s"] for run in found["traced"])
    return (
        f"| {workload}, {part} | {median_ms('bare', 0):.2f} / {median_ms('bare', 1):.2f} "
        f"| {median_ms('traced', 0):.2f} / {median_ms('traced', 1):.2f} | **{middle:.3f}** "
        f"| {low:.3f} ... {high:.3f} | {BOUND} | {own[0]:.2f} / {own[1]:.2f} | {start:.2f} | {len(pairs)} |"
    )


def first_over_second(run: dict[str, Any], part: str) -> float:
    first, second = run["parts"][part]
    return float(first / second)


def heading(found: Runs, layers: int) -> str:
    machines = {run["machine"] for ways in found.values() for runs in ways.values() for run in runs}
    return (
        f"{date.today()}, {', '.join(sorted(machines))}, {layers} layers\n\n"
        "| workload | bare: first / second ms | traced: first / second ms | ratio of ratios | quartiles "
        "| bound | our longest range: first / second ms | our start s | pairs |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )


# -- one fresh process ---------------------------------------------------------------------------------------


class Child:
    """One workload, bare or traced, in this process."""

    def __init__(self, device: str, layers: int, workload: str, way: str) -> None:
        import torch
        from bench_pairs import SMALL_SHAPE, TRUE_SHAPE
        from transformers import OlmoeConfig, OlmoeForCausalLM

        import moe_trace

        self.torch, self.moe_trace = torch, moe_trace
        self.on_gpu, self.device, self.workload, self.traced = (
            device == "cuda",
            device,
            workload,
            way == "traced",
        )
        shape = (TRUE_SHAPE if self.on_gpu else SMALL_SHAPE) | {"num_hidden_layers": layers}
        torch.manual_seed(0)
        if self.on_gpu:
            torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self.model = OlmoeForCausalLM(OlmoeConfig(**shape)).eval()
        torch.set_default_dtype(torch.float32)
        self.activities = [torch.profiler.ProfilerActivity.CPU]
        if self.on_gpu:
            self.activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.parts: dict[str, list[float]] = {}
        self.own_ms: dict[str, list[float]] = {}
        self.start_s = 0.0

    def run(self) -> dict[str, Any]:
        getattr(self, self.workload)()
        machine = self.torch.cuda.get_device_name() if self.on_gpu else platform.machine()
        return {
            "parts": self.parts,
            "own_ms": self.own_ms,
            "start_s": self.start_s,
            "machine": f"{machine}, torch {self.torch.__version__}",
        }

    # -- workloads -------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Profile the first forward of the process."""
        self.profile_twice("2048 tokens", self.forward_of(2048 if self.on_gpu else 256))

    def forward_warm(self) -> None:
        """Profile forwards of a model that has run before."""
        step = self.forward_of(2048 if self.on_gpu else 256)
        repeat(WARM_UP, step)
        self.profile_twice("2048 tokens", step)

    def decode(self) -> None:
        """Profile prefill and 8 tokens, whose reduction is not waited for until the trace is written."""
        ids = self.tokens(1, 32)

        def step() -> None:
            with self.torch.no_grad():
                self.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)

        repeat(WARM_UP, step)
        self.profile_twice("generate 8 tokens", step)

    def training(self) -> None:
        step = self.training_step()
        repeat(WARM_UP, step)
        self.profile_twice("forward and backward", step)

    def scalars(self) -> None:
        step = self.training_step()
        repeat(WARM_UP, step)
        with ExitStack() as stack:
            started = time.perf_counter()
            tracer, logger = stack.enter_context(self.logger()) if self.traced else (None, None)
            self.start_s = time.perf_counter() - started

            def logged() -> None:
                step()
                if logger is not None:
                    logger.step()

            self.profile_twice("training step and scalars", logged, tracer, ours=False)

    def compiled(self) -> None:
        self.torch._dynamo.reset()
        ids = self.tokens(1, 64)
        with ExitStack() as stack:
            started = time.perf_counter()
            tracer = stack.enter_context(self.moe_trace.MoETracer(self.model)) if self.traced else None
            self.start_s = time.perf_counter() - started
            model = self.torch.compile(self.model)

            def step() -> None:
                with self.torch.no_grad():
                    model(ids, use_cache=False)

            self.profile_twice("forward that compiles", step, tracer, ours=False)
            repeat(WARM_UP, step)
            self.profile_twice("compiled forward of 64 tokens", step, tracer, ours=False)

    # -- what they share -------------------------------------------------------------------------------

    def tokens(self, batch: int, length: int) -> Any:
        generator = self.torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        return self.torch.randint(0, vocabulary, (batch, length), generator=generator).to(self.device)

    def forward_of(self, length: int) -> Callable[[], None]:
        ids = self.tokens(1, length)

        def step() -> None:
            with self.torch.no_grad():
                self.model(ids, logits_to_keep=1)

        return step

    def training_step(self) -> Callable[[], None]:
        self.model.train()
        ids = self.tokens(2, 512 if self.on_gpu else 64)

        def step() -> None:
            self.model(ids, labels=ids).loss.backward()
            self.model.zero_grad(set_to_none=True)

        return step

    @contextmanager
    def logger(self) -> Iterator[tuple[Any, Any]]:
        from moe_trace.integrations.scalar_logger import ScalarLogger

        with (
            tempfile.TemporaryDirectory() as folder,
            self.moe_trace.MoETracer(self.model) as tracer,
            ScalarLogger(tracer, folder) as logger,
        ):
            yield tracer, logger

    def profile_twice(
        self, part: str, step: Callable[[], None], tracer: Any = None, *, ours: bool = True
    ) -> None:
        """Time two profiled steps, by `moe_trace.profile` if `ours`, else by torch's with `tracer`."""
        self.parts[part], self.own_ms[part] = [], []
        for which in range(2):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                with self.profiler(tracer, ours and self.traced) as prof:
                    if which == 0 and ours:
                        self.start_s = time.perf_counter() - started
                    self.parts[part].append(self.seconds(step))
                prof.export_chrome_trace(f"{folder}/trace.json")
                self.own_ms[part].append(longest_own_range_ms(Path(folder, "trace.json")))

    def profiler(self, tracer: Any, ours: bool) -> Any:
        if ours:
            return self.moe_trace.profile(self.model, activities=self.activities)
        prof = self.torch.profiler.profile(activities=self.activities)
        if tracer is not None:
            tracer.attach(prof)
        return prof

    def seconds(self, step: Callable[[], None]) -> float:
        self.synchronize()
        started = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()


def repeat(times: int, step: Callable[[], None]) -> None:
    for _ in range(times):
        step()


def longest_own_range_ms(trace: Path) -> float:
    """Return the longest range of our own work, not of routers and experts, which run the model's kernels."""
    from moe_trace.data.schema import OVERHEAD_RANGE

    events = json.loads(trace.read_bytes())["traceEvents"]
    return max((event["dur"] / 1e3 for event in events if event.get("name") == OVERHEAD_RANGE), default=0.0)


if __name__ == "__main__":
    main()
