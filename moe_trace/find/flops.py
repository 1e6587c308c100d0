"""FLOPs of routers and experts, computed from the shapes of their weights.

`torch.utils.flop_counter` counts 0 for `aten::_grouped_mm`, transformers' default for experts. FLOPs are 2
per multiply-add, without biases and norms, as the counter does in eager mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from moe_trace.find.contracts import Found
from moe_trace.find.contracts.modules import expert_matrices, expert_modules, int_attribute, unwrapped
from moe_trace.find.device_mesh import DataParallelDims, layout_dims

# Weights of less than a byte are packed, so their shapes are not those of the matrices that are multiplied.
_PACKED = (torch.uint8, torch.int8)


def router_flops_per_token(router: nn.Module) -> int:
    """Return 2 x the elements of the router's matrix weights (its own `weight`, or its inner Linears')."""
    inner = unwrapped(router)
    classes, hidden = int_attribute(inner, "num_experts"), int_attribute(inner, "hidden_dim", "hidden_size")
    # FSDP 1 flattens the weights of wrapped modules, so that only the module's attributes are left.
    return dense_flops_per_token(inner) or 2 * classes * hidden


def expert_flops_per_slot(weights: Iterable[nn.Module], num_experts: int) -> int:
    """Return 2 x the elements of one expert's matrix weights, summed over the modules that hold them."""
    return 2 * sum(_elements_of_one_expert(unwrapped(module), num_experts) for module in weights)


def expert_bytes(
    weights: Iterable[nn.Module], num_experts: int, data_parallel: DataParallelDims
) -> int | None:
    """Return the bytes of one expert's weights in this process, with biases and scales; None if unknown.

    Under data parallelism these are the gathered weights; under tensor parallelism, this rank's shard.

    Args:
        weights: modules that hold the experts' weights.
        num_experts: E, without identity experts.
        data_parallel: FSDP dimensions of the model that the experts belong to.
    """
    total = 0.0
    for module in map(unwrapped, weights):
        listed = expert_modules(module)
        stacked = [matrix.shape[0] for _, matrix in expert_matrices(module)] or [num_experts]
        for parameter in (listed[0] if listed else module).parameters():
            # LongCat's matrices differ in their number of rows: some include identity experts.
            first = parameter.shape[0] if parameter.dim() else 0
            rows = 1 if listed else first if first in stacked else stacked[0]
            parts = 1
            for dim in layout_dims(parameter, data_parallel):
                placement = cast("Any", parameter).placements[dim]
                if placement.is_shard() and (listed or placement.dim != 0):
                    parts *= cast("Any", parameter).device_mesh.size(dim)
            total += parameter.numel() * parameter.element_size() / rows / parts if rows else 0
    return round(total) or None


def dense_flops_per_token(module: nn.Module) -> int:
    """Return 2 x the elements of the matrix weights of a module that processes every token."""
    return 2 * sum(_own_elements(part) for part in module.modules())


def projection_note(found: Found, shared: Iterable[nn.Module]) -> str | None:
    """Return a note on other modules of the block that process every token, such as latent projections."""
    if found.block is None:
        return None
    counted = {id(m) for m in (found.router, found.gate, found.experts, *(found.weights or ()), *shared)}
    rest = {
        name: flops
        for name, child in found.block.named_children()
        if id(child) not in counted and (flops := dense_flops_per_token(child))
    }
    if not rest:
        return None
    return (
        f"{', '.join(rest)} work on every token too: {sum(rest.values()):,} FLOPs per token, "
        "part of none of these figures"
    )


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Return the number of parameters of the modules, each counted once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return sum(parameter.numel() for parameter in parameters.values())


def _own_elements(module: nn.Module) -> int:
    rows, columns = int_attribute(module, "out_features"), int_attribute(module, "in_features")
    if rows and columns:  # also correct if the weight is packed
        return rows * columns if "weight" in module._parameters else 0
    # Other 2-D parameters are excluded: some families have a selection bias of shape [1, E].
    named = {name: p for name, p in module._parameters.items() if p is not None}
    return sum(p.numel() for name, p in named.items() if p.dim() == 3 or (p.dim() == 2 and name == "weight"))


def _elements_of_one_expert(experts: nn.Module, num_experts: int) -> int:
    modules = expert_modules(experts)
    if modules:
        return dense_flops_per_token(modules[0]) // 2
    matrices = [p for _, p in expert_matrices(experts)]
    if not matrices or any(p.dtype in _PACKED for p in matrices):
        declared = _declared_elements(experts)
        if declared:
            return declared
    if matrices:
        return sum(p.shape[1] * p.shape[2] for p in matrices)
    # All experts stacked in one matrix (DBRX), or one row each (Doge).
    rows = max(num_experts, 1)
    stacked = [p for p in experts.parameters() if p.dim() == 2 and p.shape[0] % rows == 0]
    return sum(p.numel() for p in stacked) // rows


def _declared_elements(experts: nn.Module) -> int:
    """Return an expert's size by the module's attributes, for packed or replaced weights; 0 if unknown."""
    hidden = int_attribute(experts, "hidden_dim", "hidden_size")
    width = int_attribute(experts, "intermediate_dim", "intermediate_size")
    gated = hasattr(experts, "gate_up_proj") or hasattr(experts, "gate_proj")
    return hidden * width * (3 if gated else 2)
