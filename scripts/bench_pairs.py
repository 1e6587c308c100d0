"""Time pairs of bare and traced steps within one run, for the benchmarks of recording."""

from __future__ import annotations

import copy
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity
from transformers import OlmoeConfig, OlmoeForCausalLM

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

WARM_UP = 6
"""Steps inside a context before it is timed. The first one installs hooks. During the first five, a tracer
copies the choices of each router, until it knows that their memory is not overwritten."""


@dataclass(frozen=True)
class Row:
    """Result of one comparison."""

    workload: str
    bare_ms: float
    traced_ms: float
    ratio: float
    low: float
    high: float
    fastest: float
    """Fastest traced step divided by the fastest bare step, which other load disturbs least."""
    pairs: int
    bound: float | None


class Bench:
    """The model, and methods to time steps on its device."""

    def __init__(self, device: str, pairs: int) -> None:
        self.device, self.pairs = device, pairs
        self.on_gpu = device == "cuda"
        torch.manual_seed(0)
        with torch.device(device):
            self.model = OlmoeForCausalLM(OlmoeConfig(**(TRUE_SHAPE if self.on_gpu else SMALL_SHAPE)))
        self.model.to(torch.bfloat16 if self.on_gpu else torch.float32).eval()
        self.activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.on_gpu else [])
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Print and keep a measurement that is not a ratio of two steps."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        return torch.randint(0, vocabulary, (batch, length), generator=generator).to(self.device)

    def seconds(self, step: Step, *, of_host: bool = False) -> float:
        """Return the wall time of a step, or with `of_host` the CPU time of this thread, which excludes other
        threads and waiting for the device."""
        self.synchronize()
        clock = time.thread_time if of_host else time.perf_counter
        started = clock()
        step()
        if not of_host:
            self.synchronize()
        return clock() - started

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
        pairs: int | None = None,
        of_host: bool = False,
        warm_up: int = WARM_UP,
    ) -> None:
        """Add a row: median and quartiles of the pairs' ratios. Noisy workloads need more `pairs`."""
        how = {"repeat": repeat, "pairs": pairs, "of_host": of_host, "warm_up": warm_up}
        self.add_row(workload, self.pairs_of(step, bare=bare, traced=traced, **how), bound)

    def add_row(self, workload: str, found: Sequence[tuple[float, float]], bound: float | None) -> None:
        """Add a row from the (bare, traced) seconds of each pair."""
        ratios = sorted(b / a for a, b in found)
        quartiles = statistics.quantiles(ratios, n=4)
        row = Row(
            workload,
            1e3 * statistics.median(a for a, _ in found),
            1e3 * statistics.median(b for _, b in found),
            statistics.median(ratios),
            quartiles[0],
            quartiles[2],
            min(b for _, b in found) / min(a for a, _ in found),
            len(found),
            bound,
        )
        self.rows.append(row)
        print(markdown_row(row), flush=True)

    def compare_in_turn(
        self,
        workload: str,
        make_step: Callable[[Any], Step],
        *,
        bound: float | None,
        around: Callable[[Any], Any],
        around_bare: Callable[[Any], Any] = nullcontext,
        repeat: int = 64,
    ) -> None:
        """Add two rows, wall time and this thread's CPU time, from alternating single steps of two models.

        The speed of a host may drift by percents within a second, which would hide the cost in a host-bound
        step. The second model shares the weights of the first and has a tracer that is on all the time. A
        pair is the sum of `repeat` steps of each, so it includes work that is done once for many steps.

        Args:
            make_step: makes the step from a model.
            around: makes the context in which both run from the second model.
            around_bare: the same from the first model.
        """
        weights = {id(one): one for one in (*self.model.parameters(), *self.model.buffers())}
        other = copy.deepcopy(self.model, dict(weights))
        steps = make_step(self.model), make_step(other)
        passed: list[tuple[float, float]] = []
        worked: list[tuple[float, float]] = []
        with around(other), around_bare(self.model):
            for _ in range(2 * repeat):
                for step in steps:
                    step()
            gc.collect()
            gc.disable()
            for _ in range(self.pairs):
                sums = np.zeros((2, 2))
                for number in range(repeat):
                    for which in (0, 1) if number % 2 == 0 else (1, 0):
                        sums[which] += self._both_seconds(steps[which])
                passed.append((sums[0, 0], sums[1, 0]))
                worked.append((sums[0, 1], sums[1, 1]))
            gc.enable()
        for clock, found in (("", passed), (", host's CPU time", worked)):
            self.add_row(workload + clock, [(a / repeat, b / repeat) for a, b in found], bound)

    def _both_seconds(self, step: Step) -> tuple[float, float]:
        """Return wall time until the device is done, and CPU time of this thread without that wait."""
        self.synchronize()
        started, began = time.perf_counter(), time.thread_time()
        step()
        worked = time.thread_time() - began
        self.synchronize()
        return time.perf_counter() - started, worked

    def pairs_of(
        self,
        step: Step,
        *,
        bare: Callable[[], Any],
        traced: Callable[[], Any],
        repeat: int,
        pairs: int | None = None,
        of_host: bool = False,
        warm_up: int = WARM_UP,
    ) -> list[tuple[float, float]]:
        """Return (bare, traced) seconds per step, from `repeat` steps in each context in turn."""

        def steps() -> None:
            for _ in range(repeat):
                step()

        def one(context: Callable[[], Any]) -> float:
            with context():
                for _ in range(warm_up):
                    step()
                return self.seconds(steps, of_host=of_host) / repeat

        for context in (bare, traced):
            one(context)
        gc.collect()
        gc.disable()
        found = []
        for i in range(pairs or self.pairs):
            order = (bare, traced) if i % 2 == 0 else (traced, bare)
            times = {context: one(context) for context in order}
            found.append((times[bare], times[traced]))
        gc.enable()
        return found


@contextmanager
def on_one_core() -> Iterator[None]:
    """Pin this thread, so that the scheduler does not move it within a pair. Only has an effect on Linux."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@contextmanager
def nothing() -> Iterator[None]:
    yield


def plain_profiler(bench: Bench) -> Callable[[], Any]:
    return lambda: torch.profiler.profile(activities=bench.activities)


def traced_profiler(bench: Bench) -> Callable[[], Any]:
    return lambda: moe_trace.profile(bench.model, activities=bench.activities)


def hooked(bench: Bench, **arguments: Any) -> Callable[[], Any]:
    return lambda: moe_trace.MoETracer(bench.model, **arguments)


def prefill_step(bench: Bench) -> Step:
    ids = bench.tokens(1, 8192) if bench.on_gpu else bench.tokens(1, 512)

    @torch.no_grad()
    def step() -> None:
        bench.model(ids, logits_to_keep=1)

    return step


def decode_step(bench: Bench, model: Any = None) -> Step:
    """Make a decode step. Its cache grows by one token per step, equally for both halves of a pair."""
    model = bench.model if model is None else model
    with torch.no_grad():
        cache = model(bench.tokens(1, 128), use_cache=True).past_key_values
    token = bench.tokens(1, 1)

    @torch.no_grad()
    def step() -> None:
        model(token, past_key_values=cache)

    return step


def markdown_row(row: Row) -> str:
    bound = f"{row.bound:.3f}" if row.bound else "-"
    return (
        f"| {row.workload} | {row.bare_ms:.3f} | {row.traced_ms:.3f} | **{row.ratio:.4f}** | "
        f"{row.low:.4f} ... {row.high:.4f} | {row.fastest:.4f} | {row.pairs} | {bound} |"
    )


def heading(bench: Bench) -> str:
    machine = torch.cuda.get_device_name() if bench.on_gpu else platform.processor() or platform.machine()
    return (
        f"{date.today()}, {machine}, torch {torch.__version__}\n\n"
        "| workload | bare ms | traced ms | ratio | quartiles | fastest | pairs | bound |\n"
        "|---|---|---|---|---|---|---|---|"
    )
