"""A small model, and common ways to compile it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from models import tiny_olmoe, token_batch


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Each graph is compiled, none taken from a cache; only the C++ of an equal kernel is compiled once.

    `force_disable_caches` would compile that, too, and torch's headers before: 20 s for a small model.
    """
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def small_model(layers: int = 2) -> Any:
    model = tiny_olmoe(layers=layers)
    model.set_experts_implementation("grouped_mm")  # eager experts loop over data, which breaks graphs
    return model


def run(forward: Callable[..., Any], shapes: list[tuple[int, int]], seed: int = 0) -> None:
    with torch.no_grad():
        for i, (batch, length) in enumerate(shapes, start=seed):
            forward(**token_batch(batch, length, seed=i), use_cache=False)


def compile_layers(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**options)
    return model


def compile_layer_forwards(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, **options)
    return model


def compile_inner(model: Any, **options: Any) -> Any:
    model.model.compile(**options)
    return model


WAYS = {"model": torch.compile, "model.model": compile_inner, "layers": compile_layers}
