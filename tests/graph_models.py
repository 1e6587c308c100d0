"""A small model on a GPU, and ways in which torch.compile captures it in CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from models import tiny_olmoe, token_batch

BOTH = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def gpu_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = tiny_olmoe(layers=2, hidden_size=64, intermediate_size=32).to("cuda", dtype)
    # The grouped product exists in bfloat16 alone; the batched one is as free of loops over data.
    model.set_experts_implementation("grouped_mm" if dtype == torch.bfloat16 else "batched_mm")
    return model


def ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return token_batch(batch, length, seed=seed)["input_ids"].cuda()


def compile_model(model: Any, **options: Any) -> Any:
    return torch.compile(model, **options)


def compile_layers(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**options)
    return model


WAYS = {"model": compile_model, "layers": compile_layers}


def run(forward: Any, tokens: torch.Tensor) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    forward(tokens, use_cache=False)


def capture(model: Any, static: torch.Tensor, **options: Any) -> torch.cuda.CUDAGraph:
    """Warm up on a side stream, as torch asks for, and capture one forward."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(static, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        model(static, use_cache=False)
    return graph
