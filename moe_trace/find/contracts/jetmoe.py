"""Contract `sorted-dispatch`: the router returns tokens sorted by expert, and each expert's count (JetMoE).

A layer has two routers: for the experts of the MLP, and for those of the attention projections, whose block
is never called as a module. The experts are two modules `(inputs, expert_size)`, so only the router is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import (
    described,
    expert_rows,
    forward_parameters,
    int_attribute,
    unwrapped,
)
from moe_trace.find.contracts.olmoe_mixtral_qwen import router_beside
from moe_trace.find.contracts.overhead_range import overhead_range

_SIZES_ARGUMENT = "expert_size"


def find_sorted_dispatch(block: nn.Module) -> list[Found]:
    """Find a block with a router and modules that take rows sorted by expert."""
    children = dict(block.named_children())
    weights = [
        child for child in children.values() if forward_parameters(unwrapped(child))[1:2] == [_SIZES_ARGUMENT]
    ]
    router_name = router_beside(children)
    if not weights or router_name is None:
        return []
    router = unwrapped(children[router_name])
    return [
        Found(
            router=children[router_name],
            router_path=router_name,
            experts=None,
            # Mixture-of-attention blocks are called through `map` and `reduce`.
            block=None if hasattr(block, "map") and hasattr(block, "reduce") else block,
            num_experts=int_attribute(router, "num_experts") or max(expert_rows(weights[0]), default=0),
            top_k=int_attribute(router, "top_k"),
            weights=tuple(weights),
        )
    ]


def read_sorted_dispatch(call: Call) -> RouterOutput:
    """Undo the sorting: row i went to the expert in whose range it is, and was slot `positions[i]`."""
    output = call.router_output
    if not isinstance(output, tuple) or len(output) < 5:
        raise AdapterMismatch(
            "expected the router to return (positions, tokens, weights, sizes, logits), "
            f"found {described(output)}"
        )
    positions_N, _, weights_N, sizes, logits_TE = output[:5]
    _check(positions_N, weights_N, logits_TE)
    tokens, experts = logits_TE.shape
    slots = positions_N.shape[0]
    with overhead_range():
        ids_E = torch.arange(experts, device=positions_N.device)
        sizes_E = _to_device(sizes, positions_N.device)
        expert_N = torch.repeat_interleave(ids_E, sizes_E, output_size=slots)
        index_N = torch.empty_like(positions_N).scatter_(0, positions_N, expert_N)
        unsorted_N = torch.empty_like(weights_N).scatter_(0, positions_N, weights_N)
    return RouterOutput(index_N.view(tokens, -1), unsorted_N.view(tokens, -1), logits_TE)


def _check(positions_N: Any, weights_N: Any, logits_TE: Any) -> None:
    parts = (positions_N, weights_N, logits_TE)
    if not all(isinstance(part, Tensor) for part in parts) or logits_TE.dim() != 2:
        raise AdapterMismatch(f"expected positions [N], weights [N], logits [T, E], found {described(parts)}")
    slots, tokens = positions_N.shape[0], logits_TE.shape[0]
    if positions_N.dim() != 1 or weights_N.shape != positions_N.shape or slots == 0 or slots % tokens:
        raise AdapterMismatch(f"expected k rows for each of {tokens} tokens, found {described(parts)}")


def _to_device(sizes: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return the sizes as a tensor on the device, copied from pinned memory to avoid synchronizing."""
    if isinstance(sizes, Tensor):
        return sizes.to(device, non_blocking=True)
    host = torch.tensor(sizes, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


SORTED_DISPATCH = Contract(
    name="sorted-dispatch",
    description="router -> (positions, tokens, weights, sizes, logits), sorted by expert",
    find=find_sorted_dispatch,
    read=read_sorted_dispatch,
    reads_late=True,
)
