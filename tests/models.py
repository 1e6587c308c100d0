"""Tiny OLMoE models, and the oracle: what the experts modules really received."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

VOCAB = 97


def tiny_olmoe(*, layers: int = 3, experts: int = 8, top_k: int = 2, seed: int = 0, **changes: Any) -> Any:
    """A random OLMoE whose router weights are large enough that the choices differ."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 256,
    }
    model = OlmoeForCausalLM(OlmoeConfig(**values | changes)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=1.0)
    return model


def token_batch(batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass
class ExpertsCall:
    """One call of an experts module, as it was called."""

    layer: int
    index: np.ndarray
    weights: np.ndarray

    def assignments(self, experts: int) -> list[int]:
        used = (self.weights != 0) & (self.index >= 0) & (self.index < experts)
        return np.bincount(self.index[used], minlength=experts).tolist()


@contextmanager
def watch_compiled_experts(model: Any, tokens: int) -> Iterator[list[torch.Tensor]]:
    """By layer: a buffer that the code round the experts copies the index into that they receive.

    It becomes part of what is compiled or captured, so that it tells the decision of that very code: in half
    precision Inductor rounds otherwise than eager code, and a token of two equal experts goes elsewhere.
    """
    device, top_k = model.device, model.config.num_experts_per_tok
    buffers = [torch.full((tokens, top_k), -1, device=device) for _ in model.model.layers]

    def copy_to(buffer: torch.Tensor) -> Any:
        torch._dynamo.mark_static_address(buffer)

        def hook(module: Any, args: Any) -> None:
            buffer.copy_(args[1])

        return hook

    handles = [
        layer.mlp.experts.register_forward_pre_hook(copy_to(buffer))
        for layer, buffer in zip(model.model.layers, buffers, strict=True)
    ]
    try:
        yield buffers
    finally:
        for handle in handles:
            handle.remove()


def counted(buffers: list[torch.Tensor], experts: int) -> list[list[int]]:
    """Assignments by layer, from the buffers of `watch_compiled_experts`."""
    return [np.bincount(buffer.cpu().numpy().ravel(), minlength=experts).tolist() for buffer in buffers]


@contextmanager
def watch_experts(model: Any) -> Iterator[list[ExpertsCall]]:
    """Record the arguments of every experts module with a pre-hook of the test's own."""
    calls: list[ExpertsCall] = []

    def remember(layer: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            calls.append(
                ExpertsCall(layer, args[1].cpu().numpy().copy(), args[2].float().detach().cpu().numpy())
            )

        return hook

    handles = [
        layer.mlp.experts.register_forward_pre_hook(remember(i)) for i, layer in enumerate(model.model.layers)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
