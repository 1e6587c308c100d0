"""A small model, and the ways in which people compile one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models import tiny_olmoe, token_batch


def small_model() -> Any:
    model = tiny_olmoe(layers=2)
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
