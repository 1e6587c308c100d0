"""Contract `one-hot`: `experts(hidden_states, mask over all experts, weights)` (Switch, NLLB-MoE).

The router returns (mask, weights, logits). A row of zeros is a token dropped by the capacity.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import (
    described,
    expert_modules,
    forward_parameters,
    int_attribute,
    logits_module,
    returns_logits,
    unwrapped,
)
from moe_trace.find.contracts.olmoe_mixtral_qwen import router_beside
from moe_trace.find.contracts.overhead_range import overhead_range

_MASK_ARGUMENT = "router_mask"  # NLLB's name; Switch's `selected_experts` means an index elsewhere
_NLLB_NOTE = (
    "recorded as declared by the router; transformers runs other experts: it applies one_hot to a mask of 0 "
    "and 1, so that experts 0 and 1 compute every row, and FLOPs are those of the declared routing"
)


def is_one_hot_experts(module: nn.Module) -> bool:
    """Return whether experts are a dict of modules that take a mask, or name their argument a mask."""
    experts = unwrapped(module)
    parameters = forward_parameters(experts)
    if len(parameters) < 3:
        return False
    is_dict = isinstance(experts, nn.ModuleDict) and parameters[1] == "selected_experts"
    return parameters[1] == _MASK_ARGUMENT or is_dict


def find_one_hot(block: nn.Module) -> list[Found]:
    """Find a block with a router and one-hot experts."""
    children = dict(block.named_children())
    names = [name for name, child in children.items() if is_one_hot_experts(child)]
    if len(names) != 1:
        return []
    experts = children.pop(names[0])
    router_name = router_beside(children)
    if router_name is None:
        return []
    router, inner = unwrapped(children[router_name]), unwrapped(experts)
    num_experts = int_attribute(router, "num_experts") or len(expert_modules(inner))
    inside = None if returns_logits(router) else logits_module(router, num_experts)
    masks_again = _applies_one_hot_to_mask(inner)
    return [
        Found(
            router=children[router_name],
            router_path=router_name,
            experts=experts,
            block=block,
            num_experts=num_experts,
            top_k=2 if forward_parameters(inner)[1] == _MASK_ARGUMENT else 1,
            watched=None if inside is None else inside[1],
            notes=(_NLLB_NOTE,) if masks_again else (),
        )
    ]


def _applies_one_hot_to_mask(experts: nn.Module) -> bool:
    """Return whether this version of transformers has the defect that the note describes."""
    try:
        return f"one_hot({_MASK_ARGUMENT}" in inspect.getsource(type(experts).forward)
    except (OSError, TypeError):
        return False


def read_one_hot(call: Call) -> RouterOutput:
    """Read the expert in each row of Switch's mask, or the two non-zeros in each row of NLLB's weights."""
    logits, mask, weights = _parts(call)
    experts = logits.shape[-1]
    with overhead_range():
        if weights.shape[-1] == 1:
            mask_TE = mask.reshape(-1, experts)
            index = mask_TE.argmax(-1, keepdim=True).masked_fill(~mask_TE.any(-1, keepdim=True), experts)
        else:
            # The mask has the first choice only; the non-zeros of the dense weights are both choices.
            weights, index = weights.topk(2, dim=-1)
            index = index.masked_fill(weights == 0, experts)
    return RouterOutput(index, weights, logits.reshape(-1, experts))


def _parts(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits [.., E], mask [.., E], weights [T, 1 or E]) of the call."""
    output = call.router_output
    arguments = (*(call.experts_args or ()), *call.experts_kwargs.values())
    mask, weights = (arguments[1], arguments[2]) if len(arguments) >= 3 else (None, None)
    logits = output[2] if isinstance(output, tuple) and len(output) >= 3 else None
    if isinstance(call.watched_output, Tensor):  # the third output of older versions of Switch is weights
        logits = call.watched_output
    if not (isinstance(logits, Tensor) and isinstance(mask, Tensor) and isinstance(weights, Tensor)):
        raise AdapterMismatch(
            "expected the router to return (mask, weights, logits) and experts(hidden, mask, weights), "
            f"found {described(output)} and {described(arguments)}"
        )
    experts = logits.shape[-1]
    if mask.dtype not in (torch.int64, torch.bool) or mask.shape[-1] != experts or weights.dim() != 2:
        raise AdapterMismatch(
            f"expected a mask [T, {experts}] of integers and weights [T, 1] or [T, {experts}], "
            f"found {described(mask)} and {described(weights)}"
        )
    if weights.shape[-1] not in (1, experts):
        raise AdapterMismatch(f"expected weights [T, 1] or [T, {experts}], found {described(weights)}")
    return logits, mask, weights


ONE_HOT = Contract(
    name="one-hot",
    description="router -> (mask, weights, logits); experts(hidden_states, mask over all experts, weights)",
    find=find_one_hot,
    read=read_one_hot,
    reads_late=True,
)
