#!/usr/bin/env python3
"""Measure the hooks of a recorded call against empty hooks of the same kinds.

    python scripts/bench_hooks.py
    python scripts/bench_hooks.py --in-turn    # on a machine with other load
    python scripts/bench_hooks.py --in-turn --device cuda    # modules and their outputs on a GPU

The model has 16 layers of trivial modules, which compute nothing on either device. CPU time of the thread is
measured, because other load adds to wall time. Prints medians of the ratios. The first row of recording
excludes the deferred reduction; the second includes it.

With `--in-turn` each variant has its own model, and single forwards of all variants alternate within a few
milliseconds. Prints the fastest 2 % and 10 % of the forwards of each variant, which other load disturbed
least. Few of these take part in a reduction, or in processing the events of earlier forwards.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moe_trace
from moe_trace.find.private.torch_names import enter_range, leave_range

LAYERS, EXPERTS, TOP_K = 16, 64, 8
Context = Callable[[], AbstractContextManager[Any]]


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, TOP_K
        self.weight = nn.Parameter(torch.zeros(EXPERTS, 4))
        logits = torch.randn(1, EXPERTS)
        weights, index = logits.softmax(-1).topk(TOP_K)
        self.decided = logits, weights, index

    def _apply(self, move: Any, *more: Any, **options: Any) -> Any:
        self.decided = tuple(move(one) for one in self.decided)  # type: ignore[assignment]
        return super()._apply(move, *more, **options)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits, weights, index = self.decided
        return logits, weights, index


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, 4, 4))

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden_states


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(), Experts()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(hidden)
        return self.experts(hidden, index, weights)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def fresh_outputs(model: Layers, calls: int = 4096) -> None:
    """Let each router call return other memory, as real routers do, so that nothing has to be copied."""
    for layer in model.layers:
        kept = [tuple(t.clone() for t in layer.gate.decided) for _ in range(calls)]
        layer.gate.forward = iter_of(kept)


def iter_of(kept: list[Any]) -> Callable[..., Any]:
    position = 0

    def forward(hidden_states: torch.Tensor) -> Any:
        nonlocal position
        position = (position + 1) % len(kept)
        return kept[position]

    return forward


@contextmanager
def hooks_by_hand(blocks: Iterable[nn.Module], ranges: bool) -> Iterator[None]:
    """Register empty hooks of the kinds that record; if `ranges`, each pair opens a bare range.

    Args:
        blocks: modules with a `gate` and `experts`.
    """
    handles = []
    for block in blocks:
        modules = (block, block.gate, block.experts) if ranges else (block.gate, block.experts)
        for module in modules:
            opened: list[Any] = []

            def before(m: Any, args: Any, opened: list[Any] = opened) -> None:
                if ranges:
                    opened.append(enter_range("moe.bare"))

            def after(m: Any, args: Any, kwargs: Any, output: Any, opened: list[Any] = opened) -> None:
                if ranges:
                    leave_range(opened.pop())

            if ranges or module is block.gate:
                handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, always_call=True, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


def empty_hooks(model: Layers, ranges: bool) -> AbstractContextManager[None]:
    return hooks_by_hand(model.layers, ranges)


def microseconds(model: Layers, context: Context, forwards: int) -> float:
    """Return the CPU time of a forward inside the context, per layer."""
    hidden = torch.zeros(1, 4, device=model.layers[0].gate.weight.device)
    with context(), torch.no_grad():
        for _ in range(20):  # installs the hooks and shows that each router call writes to other memory
            model(hidden)
        started = time.thread_time()
        for _ in range(forwards):
            model(hidden)
        return 1e6 * (time.thread_time() - started) / forwards / LAYERS


def in_turn(
    name: str, device: str, ways: Sequence[Callable[[Layers], AbstractContextManager[Any]]], around: Any
) -> None:
    """Time and print three variants: `ways` are bare, with empty hooks, and with ours."""
    models = [Layers().eval().to(device) for _ in ways]
    times: list[list[int]] = [[] for _ in ways]
    hidden, clock = torch.zeros(1, 4, device=device), time.perf_counter_ns
    with ExitStack() as stack, torch.no_grad():
        for model, way in zip(models, ways, strict=True):
            fresh_outputs(model, 512)
            stack.enter_context(way(model))
        for model in models * 40:
            model(hidden)
        with around():
            for _ in range(150):
                for model, taken in zip(models, times, strict=True):
                    for number in range(10):
                        started = clock()
                        model(hidden)
                        if number > 1:  # the first ones find other variants' data in the processor's caches
                            taken.append(clock() - started)
    shown = []
    for share in (0.02, 0.1):
        bare, empty, ours = (1e-3 * sorted(taken)[int(len(taken) * share)] / LAYERS for taken in times)
        shown += [f"{empty - bare:.2f}", f"{ours - bare:.2f}", f"**{(ours - bare) / (empty - bare):.2f}**"]
    print(f"| {name} | {' | '.join(shown)} |", flush=True)


def row(
    name: str, model: Layers, bare: Context, empty: Context, ours: Context, pairs: int, bound: Any
) -> None:
    ratios, costs = [], []
    for _ in range(pairs):
        base, hooks, recorded = (microseconds(model, one, 40) for one in (bare, empty, ours))
        ratios.append((recorded - base) / (hooks - base))
        costs.append((hooks - base, recorded - base))
    low, middle, high = statistics.quantiles(ratios, n=4)
    empty_us, ours_us = (statistics.median(side) for side in zip(*costs, strict=True))
    print(
        f"| {name} | {empty_us:.2f} | {ours_us:.2f} | **{middle:.2f}** | {low:.2f} ... {high:.2f} "
        f"| {bound} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"{options.device}; us a layer\n"
    )
    if options.in_turn:
        all_in_turn(options.device)
    else:
        all_pairs(options.pairs, options.device)


def activities_of(device: str) -> list[torch.profiler.ProfilerActivity]:
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return both if torch.device(device).type == "cuda" else both[:1]


@contextmanager
def without_reduction(model: Layers) -> Iterator[None]:
    with moe_trace.MoETracer(model) as tracer:
        recorder = tracer._recorder
        recorder.reduce = recorder._pending.take  # type: ignore[method-assign]
        yield


def all_in_turn(device: str) -> None:
    print("| | empty, 2 % | ours | ratio | empty, 10 % | ours | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    empty = partial(empty_hooks, ranges=False)
    in_turn("recording, without the reduction", device, (nullcontext, empty, without_reduction), nullcontext)
    off = partial(moe_trace.MoETracer, warmup=10**9)
    in_turn("sampling off", device, (nullcontext, empty, off), nullcontext)
    profiled = partial(torch.profiler.profile, activities=activities_of(device))
    ways = nullcontext, partial(empty_hooks, ranges=True), without_reduction
    in_turn("under a profiler, with ranges", device, ways, profiled)


def all_pairs(pairs: int, device: str) -> None:
    model = Layers().eval().to(device)
    fresh_outputs(model)

    print("| | empty hooks | ours | ratio | quartiles | bound |\n| --- | ---: | ---: | ---: | --- | ---: |")
    empty, ours = partial(empty_hooks, model, False), partial(without_reduction, model)
    row("recording, without the reduction", model, nullcontext, empty, ours, pairs, 2.0)
    row("recording", model, nullcontext, empty, partial(moe_trace.MoETracer, model), pairs, "-")
    row(
        "sampling off",
        model,
        nullcontext,
        empty,
        partial(moe_trace.MoETracer, model, warmup=10**9),
        pairs,
        0.2,
    )
    activities = activities_of(device)
    profiled = partial(torch.profiler.profile, activities=activities)

    @contextmanager
    def with_ranges() -> Iterator[None]:
        with profiled(), empty_hooks(model, True):
            yield

    ours = partial(moe_trace.profile, model, activities=activities)
    row("under a profiler, with ranges", model, profiled, with_ranges, ours, max(5, pairs // 3), 1.3)


if __name__ == "__main__":
    main()
