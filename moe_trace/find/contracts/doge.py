"""Contract `product-key`: experts are rows of two embeddings, chosen by the sum of two keys (Doge).

A linear layer computes two halves of sqrt(E) scores; expert `i * sqrt(E) + j` has the score `x[i] + y[j]`.
There are no logits of experts, so entropy, confidence and z-loss are left empty.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import described, int_attribute, require_2d
from moe_trace.find.contracts.overhead_range import overhead_range

_PARTS = ("router_gate", "up_embed", "down_embed")
_SHARED = ("gate_proj", "up_proj", "down_proj")
_NOTE = (
    "chosen by the sum of two halves of sqrt(E) keys: there are no logits of the experts, so entropy, "
    "confidence and z-loss are empty"
)


def find_product_key(block: nn.Module) -> list[Found]:
    """Find a block with a key layer and two embeddings of experts."""
    children = dict(block.named_children())
    keys = int_attribute(block, "num_keys")
    if not keys or any(name not in children for name in _PARTS):
        return []
    normalised = bool(getattr(block, "norm_topk_prob", False))
    return [
        Found(
            router=children["router_gate"],
            router_path="router_gate",
            experts=children["up_embed"],
            block=block,
            num_experts=int_attribute(block, "num_experts"),
            top_k=int_attribute(block, "top_k"),
            read=partial(read_product_key, keys=keys, normalised=normalised),
            times_experts=False,
            weights=(children["down_embed"], children["up_embed"]),
            shared=tuple(children[name] for name in _SHARED if name in children),
            notes=(_NOTE,),
        )
    ]


def read_product_key(call: Call, keys: int = 1, *, normalised: bool = False) -> RouterOutput:
    """Read the index that was passed to the embeddings; weights are the softmax of those experts' scores."""
    index: Any = call.experts_args[0] if call.experts_args else None
    scores = call.router_output
    require_2d("index", index, integer=True)
    if not isinstance(scores, Tensor) or scores.numel() != 2 * keys * index.shape[0]:
        raise AdapterMismatch(f"expected 2 x {keys} scores for each token, found {described(scores)}")
    with overhead_range():
        # As in the model's code, the halves are split by position in memory, not along the last dimension.
        x_TR, y_TR = scores.detach().view(2, index.shape[0], keys).unbind()
        summed_TK = x_TR.gather(-1, index // keys) + y_TR.gather(-1, index % keys)
        weights_TK = summed_TK.softmax(-1)
        if normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return RouterOutput(index, weights_TK, None)


PRODUCT_KEY = Contract(
    name="product-key",
    description="router_gate -> two halves of keys; up_embed(index), down_embed(index)",
    find=find_product_key,
    read=read_product_key,
)
