"""Fused blocks: neither the router nor the experts module is called, so hooks on them see nothing.

GPT-OSS under MXFP4 or MegaBlocks kernels computes the logits from `router.weight` inside the block and hands
them to a kernel. The decision is computed again from the block's input, by the same formula as the router's
own forward. Other fused blocks are reported as never called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, RouterOutput
from moe_trace.find.contracts.modules import described, int_attribute
from moe_trace.find.contracts.overhead_range import overhead_range

# Routers that are nothing but top-k of `linear(x, weight, bias)` and a softmax over the k: only for those is
# the decision of a fused kernel known without looking into it.
RECOMPUTABLE_ROUTERS = frozenset({"GptOssTopKRouter"})


def fused_block_reader(router: nn.Module) -> Callable[[tuple[Any, ...], Any], RouterOutput] | None:
    """`read(arguments, output)` of the block's call, or None where nobody can tell the decision."""
    if type(router).__name__ not in RECOMPUTABLE_ROUTERS:
        return None
    top_k = int_attribute(router, "top_k")

    def read(arguments: tuple[Any, ...], output: Any) -> RouterOutput:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise AdapterMismatch(f"expected the fused block to be given a tensor, found {described(hidden)}")
        with overhead_range():
            flat_TH = hidden.reshape(-1, hidden.shape[-1])
            weight, bias = router.get_parameter("weight"), router.get_parameter("bias")
            logits_TE = torch.nn.functional.linear(flat_TH, weight, bias)
            top_TK, index_TK = logits_TE.topk(top_k, dim=-1)
            return RouterOutput(index_TK, top_TK.softmax(-1), logits_TE)

    return read
