#!/usr/bin/env python3
"""Compare the cost of `MoEProfiler` per router call with a Python loop over tokens.

    python scripts/bench_simple.py                     # 2048 tokens, 64 experts, top-8, on the CPU
    python scripts/bench_simple.py --device cuda

Per router call, medians over repeats:
  hooks    host time of the hooks inside the forward, without the reduction
  reduce   the reduction to metrics at the end of a forward, divided by its calls (on a GPU: its launch)
  naive    the same counts by a Python loop over the tokens of one call, as in early profilers
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_trace import MoEProfiler

LAYERS, EXPERTS, TOP_K = 16, 64, 8


@dataclass(frozen=True)
class Cost:
    """Milliseconds per router call: median, smallest, largest."""

    what: str
    median_ms: float
    low_ms: float
    high_ms: float


class SkipExperts(nn.Module):
    """Replacement of the experts, whose time of seconds on a CPU would hide what is measured."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the input unchanged."""
        return hidden_states


def build(device: str) -> Any:
    """Build a model with OLMoE's routing sizes and small matrices elsewhere."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=128,
    )
    model = OlmoeForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp.experts = SkipExperts()
    return model.to(device)


def bench(device: str, tokens: int, repeats: int) -> list[Cost]:
    """Measure the three costs, interleaved."""
    model = build(device)
    ids = torch.randint(0, 128, (1, tokens), device=device)
    taken: dict[str, list[float]] = {"hooks": [], "reduce": [], "naive": []}
    index = model.model.layers[0].mlp.gate(torch.randn(tokens, 64, device=device))[2]
    for _ in range(repeats):
        hooks, reduce = _hooks_and_reduction_ms(model, ids)
        taken["hooks"].append(hooks)
        taken["reduce"].append(reduce)
        taken["naive"].append(_milliseconds(lambda: naive_counts(index)))
    return [Cost(w, statistics.median(t), min(t), max(t)) for w, t in taken.items()]


def naive_counts(index_TK: Tensor) -> Counter[int]:
    """Count assignments per expert, token by token."""
    counts: Counter[int] = Counter()
    for token in range(index_TK.shape[0]):
        for slot in range(index_TK.shape[1]):
            counts[int(index_TK[token, slot])] += 1
    return counts


def _hooks_and_reduction_ms(model: Any, ids: Tensor) -> tuple[float, float]:
    """Return time in our own functions during a forward; a difference of two forwards would be noise."""
    profiler = MoEProfiler(model)
    spent = {"hooks": 0.0, "reduce": 0.0}
    for hooks in profiler.tracer._hooks.routers:
        for name in ("before_router", "after_router", "before_experts", "after_experts"):
            setattr(hooks, name, _clocked(getattr(hooks, name), spent, "hooks"))
    recorder = profiler.tracer._recorder
    recorder.reduce = _clocked(recorder.reduce, spent, "reduce")  # type: ignore[method-assign]
    with torch.no_grad(), profiler:
        model(ids)
        spent.update(hooks=0.0, reduce=0.0)
        for _ in range(3):
            model(ids)
        profiler.tracer._recorder.reduce()
    calls = 3 * LAYERS
    # The time of a reduction that a hook triggers counts as reduction.
    return spent["hooks"] / calls, spent["reduce"] / calls


def _clocked(function: Callable[..., Any], spent: dict[str, float], what: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        inner = spent["reduce"]
        started = time.perf_counter()
        result = function(*args, **kwargs)
        taken = 1000 * (time.perf_counter() - started)
        spent[what] += taken - (spent["reduce"] - inner) if what == "hooks" else taken
        return result

    return run


def _milliseconds(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Print the costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{arguments.tokens} tokens, {EXPERTS} experts, top-{TOP_K}; ms per router call (min-max)")
    for cost in bench(arguments.device, arguments.tokens, arguments.repeats):
        print(f"  {cost.what:8} {cost.median_ms:9.4f}  ({cost.low_ms:.4f}-{cost.high_ms:.4f})")


if __name__ == "__main__":
    main()
