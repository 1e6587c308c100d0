"""Workloads of `bench_overhead.py`: eager forwards and decode steps, and the hooks alone."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from bench_hooks import hooks_by_hand
from bench_pairs import (
    Bench,
    Step,
    decode_step,
    hooked,
    nothing,
    on_one_core,
    plain_profiler,
    prefill_step,
    traced_profiler,
)
from torch import nn

import moe_trace


def prefill(bench: Bench) -> None:
    step, name = prefill_step(bench), "8192-token forward" if bench.on_gpu else "512-token forward"
    recorded = {"bare": nothing, "traced": hooked(bench), "repeat": 8}
    bench.compare(f"{name}, no profiler", step, **recorded, bound=1.002)
    bench.compare(f"{name}, a tracer's steps 2 to 9", step, **recorded, bound=None, warm_up=1)
    bench.compare(
        f"{name}, profiler",
        step,
        bare=plain_profiler(bench),
        traced=traced_profiler(bench),
        bound=1.005,
        repeat=4,
    )


def blocks_of(model: Any) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def empty_hooks(model: Any) -> Any:
    """Register the same number of empty hooks, to measure what torch itself takes to call them."""
    return hooks_by_hand(blocks_of(model), ranges=False)


def decode(bench: Bench) -> None:
    """Measure decode steps, which are host-bound."""

    def step_of(model: Any) -> Step:
        return decode_step(bench, model)

    def profiled(model: Any) -> Any:
        return moe_trace.profile(model, activities=bench.activities)

    with on_one_core():
        bench.compare_in_turn("eager decode", step_of, around=moe_trace.MoETracer, bound=1.005)
        bench.compare_in_turn("eager decode, empty hooks", step_of, around=empty_hooks, bound=None)
        bench.compare_in_turn(
            "eager decode, profiler, to the same ranges by hand",
            step_of,
            around=profiled,
            around_bare=lambda model: hooks_by_hand(blocks_of(model), ranges=True),
            bound=1.01,
            repeat=8,
        )
        bench.compare_in_turn("eager decode, profiler", step_of, around=profiled, bound=None, repeat=8)


def short(bench: Bench) -> None:
    """Measure forwards of 128 tokens, where the host launches more slowly than the device computes."""
    ids = bench.tokens(1, 128)

    def step_of(model: Any) -> Step:
        @torch.no_grad()
        def step() -> None:
            model(ids)

        return step

    with on_one_core():
        bench.compare_in_turn("128-token forward", step_of, around=moe_trace.MoETracer, bound=1.01, repeat=64)


class HooksAlone(nn.Module):
    """The model's MoE blocks, with routers that return a stored decision and experts that do nothing."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        hidden = torch.randn(1, bench.model.config.hidden_size, device=bench.device, dtype=bench.model.dtype)
        for layer in bench.model.model.layers:
            block = copy.copy(layer.mlp)
            block._modules = {name: copy.copy(module) for name, module in layer.mlp._modules.items()}
            with torch.no_grad():
                decision = block.gate(hidden)
            block.gate.forward = lambda *_, decision=decision: decision
            block.experts.forward = lambda states, *_: states
            self.blocks.append(block)

    def forward(self, hidden: torch.Tensor) -> None:
        for block in self.blocks:
            block(hidden)


def hooks(bench: Bench) -> None:
    """Measure host time per router call without the rest of the forward."""
    model = HooksAlone(bench)
    hidden = torch.randn(1, 1, bench.model.config.hidden_size, device=bench.device, dtype=bench.model.dtype)

    @torch.no_grad()
    def step() -> None:
        model(hidden)

    activities = bench.activities
    ways = {
        "recording": (nothing, lambda: moe_trace.MoETracer(model)),
        "sampling off for the step (bound 2 us)": (nothing, lambda: moe_trace.MoETracer(model, warmup=10**9)),
        "recording with ranges, under a profiler": (
            lambda: torch.profiler.profile(activities=activities),
            lambda: moe_trace.profile(model, activities=activities),
        ),
    }
    for name, (bare, traced) in ways.items():
        pairs = bench.pairs_of(step, bare=bare, traced=traced, repeat=100)
        costs = [1e6 * (b - a) / len(model.blocks) for a, b in pairs]
        low, middle, high = statistics.quantiles(costs, n=4)
        bench.note(f"host time per router call, {name}: {middle:.1f} us (quartiles {low:.1f} ... {high:.1f})")


WORKLOADS = {"prefill": prefill, "decode": decode, "short": short, "hooks": hooks}
