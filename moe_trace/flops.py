"""Floating-point operations of routers and experts, by formula.

`torch.utils.flop_counter` counts 0 for `aten::_grouped_mm`, transformers' default for experts, so FLOPs
come from the shapes of the real weights: 2 per multiply-add, biases and norms excluded, as the counter
does in eager mode.
"""

from __future__ import annotations

from torch import nn


def router_flops_per_token(router: nn.Module) -> int:
    """2 x the elements of the router's 2-D matrix weights (its own `weight`, or its inner Linears')."""
    return 2 * sum(p.numel() for name, p in router.named_parameters() if _is_matrix(name, p))


def expert_flops_per_slot(experts: nn.Module) -> int:
    """2 x the matrix weights of one expert: the sum of `param[0].numel()` over the 3-D parameters."""
    return 2 * sum(p[0].numel() for p in experts.parameters() if p.dim() == 3)


def parameter_count(module: nn.Module | None) -> int:
    """Number of parameters below the module; 0 for None."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    # Not "every 2-D parameter": some families keep a selection bias of shape [1, E].
    return parameter.dim() == 2 and name.rsplit(".", 1)[-1] == "weight"
