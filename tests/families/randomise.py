"""Draw the weights that decide a routing.

Fresh models have routers so flat, and selection biases so zero, that a wrong reading ("top-k of the logits",
"ignore the bias") gives the right answer by accident. Here both matter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

ROUTER_NAMES = frozenset({"gate", "router", "router_gate"})
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
LOGIT_STD = 1.5
BIAS_STD = 0.15
"""Beside sigmoid scores in 0..1 and softmax scores near 1/8: enough to change choices, not to make them."""


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw router weights, selection biases, token-to-expert tables and whatever ``model`` left undrawn."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in _named_tensors(model):
        path = name.split(".")
        if path[-1] == "tid2eid":
            tensor.copy_(_distinct_experts(model.get_submodule(".".join(path[:-1])), tensor, draw))
        elif path[-1] in SELECTION_BIASES:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * BIAS_STD)
        elif ROUTER_NAMES.intersection(path) and "norm" not in name:
            tensor.copy_(_router_weight(path[-1], tensor, draw))
        elif _is_undrawn(tensor):
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * tensor.shape[-1] ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # A padding token of zeros stays zero through the layers, and no scaling would ever move its row.
            row = module.weight[module.padding_idx]
            row.copy_(torch.randn(row.shape, generator=draw) * module.weight.std())


@contextlib.contextmanager
def undrawn_memory_is_nan() -> Iterator[None]:
    """Some classes never initialise their experts: left so, weights would differ from run to run."""
    switch: Any = torch.utils.deterministic  # a module that is an object with properties
    before = torch.are_deterministic_algorithms_enabled(), switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switch.fill_uninitialized_memory = before[1]


def _is_undrawn(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return False
    return bool(torch.isnan(tensor).any()) or (tensor.ndim >= 2 and not tensor.any())


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, then persistent buffers: what is not persistent follows from the config."""
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    return [*model.named_parameters(), *buffers]


def _router_weight(leaf: str, tensor: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=draw)
    if tensor.ndim >= 2:
        return noise * LOGIT_STD * tensor.shape[-1] ** -0.5
    if leaf.endswith("bias"):
        return noise * BIAS_STD
    return 1 + 0.3 * noise.clamp(-2, 2)


def _distinct_experts(router: nn.Module, table: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A table [vocab, k] in which no token has the same expert twice."""
    scores = torch.rand((table.shape[0], router.get_parameter("weight").shape[0]), generator=draw)
    return scores.topk(table.shape[1]).indices
