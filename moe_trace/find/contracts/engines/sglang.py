"""Contract `sglang-topk`: SGLang's `TopK(hidden_states, router_logits) -> StandardTopKOutput`, by structure.

It was written from the source of `sglang.srt.layers.moe.topk`, and has not been run with it. The output of
`TopK` in eager mode (`--disable-cuda-graph`) is read: ids of physical experts if there are redundant ones,
columns of fused shared experts last, -1 for padding. The gate is not always called as a module, and some
blocks append shared experts to the experts' arguments, so neither is read. `BypassedTopKOutput` and
`TritonKernelTopKOutput` contain no ids: such calls are counted as lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import described, int_attribute, require_2d, unwrapped

_GATES = ("gate", "router")


def find_sglang_topk(block: nn.Module) -> list[Found]:
    """Find a block with a module that has a `topk_config` and an experts module with `num_experts`."""
    children = dict(block.named_children())
    chosen = [name for name, child in children.items() if _config(child) is not None]
    experts = children.get("experts")
    if len(chosen) != 1 or experts is None or not int_attribute(unwrapped(experts), "num_experts"):
        return []
    topk, config = children[chosen[0]], _config(children[chosen[0]])
    fused, top_k = int_attribute(config, "num_fused_shared_experts"), int_attribute(config, "top_k")
    physical = int_attribute(unwrapped(experts), "num_experts") - fused
    gate = next((children[name] for name in _GATES if name in children), None)
    logical = _rows(gate) or physical
    return [
        Found(
            router=topk,
            router_path=chosen[0],
            experts=experts,
            block=block,
            num_experts=max(logical, physical),
            top_k=top_k - fused,
            gate=gate,
            read=_reader(top_k, fused, physical, logical),
            notes=_notes(fused, physical, logical),
        )
    ]


def _config(module: nn.Module) -> Any:
    config = getattr(unwrapped(module), "topk_config", None)
    return config if int_attribute(config, "top_k") else None


def _rows(gate: nn.Module | None) -> int:
    weight = None if gate is None else getattr(unwrapped(gate), "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def _reader(top_k: int, fused: int, physical: int, logical: int) -> Callable[[Call], RouterOutput]:
    if fused and physical != logical:
        return _refuse_interleaved
    return partial(read_sglang_topk, top_k=top_k, fused=fused, with_logits=physical == logical)


def _notes(fused: int, physical: int, logical: int) -> tuple[str, ...]:
    notes = []
    if fused:
        notes.append(f"{fused} shared experts are fused into the routed ones and are not counted")
    if physical > logical:
        notes.append(
            f"{logical} experts on {physical} physical slots: ids and counts are those of the slots, so a "
            "replica is counted apart from its expert, and there are no logits"
        )
    return tuple(notes)


def read_sglang_topk(call: Call, *, top_k: int, fused: int = 0, with_logits: bool = True) -> RouterOutput:
    """Read `topk_ids`, `topk_weights` and `router_logits` of the output, without columns of shared experts.

    Raises:
        AdapterMismatch: the output has no ids, or does not have `top_k` columns.
    """
    output = call.router_output
    ids, weights = (getattr(output, name, None) for name in ("topk_ids", "topk_weights"))
    if ids is None or weights is None:
        raise AdapterMismatch(
            "expected StandardTopKOutput(topk_weights, topk_ids, router_logits), found "
            f"{type(output).__name__}: its kernel chooses the experts itself"
        )
    require_2d("topk_ids", ids, integer=True)
    require_2d("topk_weights", weights)
    if ids.shape != weights.shape or ids.shape[1] != top_k:
        raise AdapterMismatch(
            f"expected ids and weights of [T, {top_k}], found {described(ids)} and {described(weights)}"
        )
    routed = top_k - fused
    logits = getattr(output, "router_logits", None) if with_logits else None
    return RouterOutput(ids[:, :routed], weights[:, :routed], logits)


def _refuse_interleaved(call: Call) -> RouterOutput:
    raise AdapterMismatch(
        "expected shared experts behind the routed ones, found them interleaved with the slots of each rank "
        "(DeepEP with fused shared experts): start SGLang with --disable-shared-experts-fusion"
    )


SGLANG_TOPK = Contract(
    name="sglang-topk",
    description="TopK(hidden_states, router_logits) -> StandardTopKOutput (SGLang, eager)",
    find=find_sglang_topk,
    read=partial(read_sglang_topk, top_k=0),
    reads_late=True,
)
