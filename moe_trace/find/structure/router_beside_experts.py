"""router-beside-experts: a router module and its experts in one block, whatever framework they are of.

torchtitan, OLMo-core, NeMo Automodel, Megatron-core, DeepSpeed, and the `MoEGate` of remote code. The modules
say where a router stands and how many experts it has; what it decided is read from the form of its output, or
from what the experts were handed where that tells it.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import (
    class_name,
    described,
    expert_modules,
    expert_rows,
    forward_parameters,
    int_attribute,
    logits_module,
    unwrapped,
)
from moe_trace.find.structure.index_and_weights import MASK_ARGUMENT, Decision, read_index
from moe_trace.find.structure.masks import read_masks

_ROUTER_NAME = re.compile(r"^(gate|router|.*_router)$")
_ROUTER_CLASS = re.compile(r"Router|Gate(V\d+)?$|Gating$|TopK")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_CLASSES = ("num_experts", "n_experts", "n_routed_experts", "num_moe_experts")
_LOCAL = (*_CLASSES, "num_local_experts", "moe_num_experts")
_TOP_K = ("top_k", "topk", "k", "num_experts_per_tok", "moe_router_topk", "n_activated_experts")


def find_router_beside_experts(block: nn.Module) -> list[Found]:
    """A block of one router, which is more than a linear layer, and one module of experts."""
    children = {n: c for n, c in block.named_children() if "shared" not in n}
    routers = [name for name, child in children.items() if _is_router(name, unwrapped(child))]
    holders = [n for n, c in children.items() if n not in routers and _holds_experts(n, unwrapped(c))]
    if len(routers) != 1 or len(holders) != 1:
        return []
    router, experts = unwrapped(children[routers[0]]), children[holders[0]]
    classes, held = router_classes(router), experts_held(unwrapped(experts))
    if classes < 2 or classes % held:  # each rank of expert parallelism holds an equal part
        return []
    inside = logits_module(router, classes)
    is_list = isinstance(unwrapped(experts), nn.ModuleList)
    top_k = _chosen(router, block)
    return [
        Found(
            router=children[routers[0]],
            router_path=routers[0],
            experts=None if is_list else experts,
            block=block,
            num_experts=classes,
            top_k=top_k,
            watched=None if inside is None else inside[1],
            weights=(experts,),
            read=partial(
                read_by_structure,
                num_experts=classes,
                top_k=top_k,
                names=() if is_list else tuple(forward_parameters(unwrapped(experts))),
            ),
        )
    ]


def _is_router(name: str, module: nn.Module) -> bool:
    named = _ROUTER_NAME.match(name) or _ROUTER_CLASS.search(class_name(module))
    return bool(named) and not isinstance(module, nn.Linear) and not expert_modules(module)


def _holds_experts(name: str, module: nn.Module) -> bool:
    return bool(_EXPERTS.search(name) or _EXPERTS.search(class_name(module))) and experts_held(module) > 0


def router_classes(router: nn.Module) -> int:
    """E: by the router's own word, else by its one linear layer or weight; 0 where nothing tells."""
    told = int_attribute(router, *_CLASSES) or int_attribute(getattr(router, "config", None), *_CLASSES)
    if told:
        return told
    linear = [c for c in router.children() if isinstance(unwrapped(c), nn.Linear)]
    if len(linear) == 1:
        return int_attribute(unwrapped(linear[0]), "out_features")
    weight = router._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0


def experts_held(experts: nn.Module) -> int:
    """How many experts a module holds, on this rank: in a list, as 3-D weights, or by its own word."""
    lists = [len(expert_modules(part)) for part in experts.modules()]
    told = [int_attribute(part, *_LOCAL) for part in experts.modules()]
    return max(*lists, 0) or max(expert_rows(experts), default=0) or max(*told, 0)


def _chosen(router: nn.Module, block: nn.Module) -> int:
    config = getattr(router, "config", None)
    return int_attribute(router, *_TOP_K) or int_attribute(config, *_TOP_K) or int_attribute(block, *_TOP_K)


def read_by_structure(
    call: Call, *, num_experts: int, top_k: int, names: tuple[str, ...] = ()
) -> RouterOutput:
    """The decision as the experts were handed it, else as the router returned it.

    Args:
        num_experts: E.
        top_k: K; 0 where only the call tells.
        names: of the parameters of the experts' forward, for a mask of tokens among them.

    Raises:
        AdapterMismatch: neither has a form that tells one decision.
    """
    output = call.router_output
    parts = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    given = dict(zip(names, call.experts_args or (), strict=False)) | call.experts_kwargs
    decision = (
        read_index(tuple(given.values())[1:], num_experts)
        or read_index(parts, num_experts)
        or read_masks(parts, num_experts, top_k)
    )
    if decision is None:
        raise AdapterMismatch(
            f"expected a router's output that tells one decision over {num_experts} experts - a whole-number "
            "tensor [.., K] with weights of its shape, a boolean map [T, E] with top-k known, or a mask "
            f"[T, E, C] - found {described(output)}"
        )
    return _with_logits(decision.without(given.get(MASK_ARGUMENT), num_experts), call, num_experts)


def _with_logits(decision: Decision, call: Call, num_experts: int) -> RouterOutput:
    logits: Any = call.watched_output
    if not isinstance(logits, Tensor) or logits.shape[-1] != num_experts:
        return RouterOutput(decision.index_TK, decision.weights_TK, None)
    return RouterOutput(decision.index_TK, decision.weights_TK, logits.reshape(-1, num_experts))


ROUTER_BESIDE_EXPERTS = Contract(
    name="router-beside-experts",
    description="router -> whole-number ids [.., K] and weights, or a mask over experts; told by its form",
    find=find_router_beside_experts,
    read=partial(read_by_structure, num_experts=0, top_k=0),
    reads_late=True,
)
