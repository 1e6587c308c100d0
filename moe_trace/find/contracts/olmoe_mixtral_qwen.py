"""topk-experts: `experts(hidden_states, index, weights)`, the contract of nearly every family.

What the experts module receives is the decision, whichever way the router came to it: by logits, by biased
scores, within groups, by a table, in the router or (DBRX) in the block. The router's own output is needed for
the logits alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from moe_trace.find.contracts.contract import Contract, Found
from moe_trace.find.contracts.modules import (
    expert_rows,
    forward_parameters,
    int_attribute,
    logits_module,
    returns_logits,
    unwrapped,
)
from moe_trace.find.contracts.topk_reading import (
    HIDDEN_ARGUMENT,
    INDEX_ARGUMENTS,
    choice_columns,
    choice_inside_reader,
    combine_experts_calls,
    fused_block_reader,
    read_topk_experts,
    read_watched_logits,
    read_without_logits,
    topk_columns,
)

ROUTER_NAMES = ("gate", "router")
_ROUTER_CLASS = re.compile(r"Router|Gat(e|ing)$|TopK")
Rule = Callable[[nn.Module, nn.Module], dict[str, Any]]
"""`rule(router, experts)` -> what a family sets differently in `Found`; nothing if it is none of it."""


def is_topk_experts(module: nn.Module) -> bool:
    """Whether the module is called as `experts(hidden_states, index, weights)`; wrappers are seen through."""
    parameters = forward_parameters(unwrapped(module))
    return len(parameters) >= 3 and parameters[1] in INDEX_ARGUMENTS


def chooses_itself(module: nn.Module) -> bool:
    """Whether the module is called as `experts(hidden_states, router_logits)`, and has a method to choose."""
    experts = unwrapped(module)
    return forward_parameters(experts) == [HIDDEN_ARGUMENT, "router_logits"] and callable(
        getattr(experts, "route_tokens_to_experts", None)
    )


def find_topk_experts(block: nn.Module) -> list[Found]:
    """A block whose children are an experts module, told by its signature, and the router beside it."""
    children = dict(block.named_children())
    experts_names = [
        name for name, child in children.items() if is_topk_experts(child) or chooses_itself(child)
    ]
    if len(experts_names) != 1:
        return []
    experts = children.pop(experts_names[0])
    router_name = router_beside(children)
    if router_name is None:
        return []
    router = unwrapped(children[router_name])
    fields: dict[str, Any] = {
        "router": children[router_name],
        "router_path": router_name,
        "experts": experts,
        "block": block,
        "num_experts": class_count(router, unwrapped(experts)),
        "top_k": slot_count(router, block),
        "read_block": fused_block_reader(router),
    }
    if any("attn" in name for name in children):
        # Router and experts stand in the decoder layer itself, beside its dense network: no block to time.
        fields |= {"block": None, "shared": tuple(children[name] for name in ("mlp",) if name in children)}
    for rule in RULES:
        fields |= rule(router, unwrapped(experts))
    return [Found(**fields)]


def router_beside(children: dict[str, nn.Module]) -> str | None:
    """The one child that is a router: by its name, else by the name of its class; None if that is unclear."""
    named = [name for name in ROUTER_NAMES if name in children]
    if not named:
        classes = {name: type(unwrapped(child)).__name__ for name, child in children.items()}
        named = [name for name, class_name in classes.items() if _ROUTER_CLASS.search(class_name)]
    return named[0] if len(named) == 1 else None


def class_count(router: nn.Module, experts: nn.Module) -> int:
    """E. Under expert parallelism `experts.num_experts` is the local count, so the largest word wins."""
    return max(
        int_attribute(router, "num_experts", "n_routed_experts"),
        int_attribute(experts, "num_experts"),
        max(expert_rows(experts), default=0),
    )


def slot_count(router: nn.Module, block: nn.Module) -> int:
    """K, as far as it can be told before a call."""
    config = getattr(router, "config", None)
    return (
        int_attribute(router, "top_k")
        or int_attribute(block, "top_k")
        or int_attribute(config, "top_k_experts", "num_experts_per_tok", "moe_topk", "moe_top_k")
    )


# -- rules of families that say the same in another way ------------------------------------------------


def hash_router(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """DeepSeek-V4's hash layers: experts by a table of token ids, logits only weigh them."""
    if not hasattr(router, "tid2eid"):
        return {}
    note = "chosen by a table of token ids: no logits decide, so entropy, confidence and z-loss are empty"
    return {"read": read_without_logits, "notes": (note,)}


def no_logits_returned(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Routers that return something else where logits are expected; see `returns_logits`.

    Where a module inside computes them (Gemma 4's `proj`, AFMoE's `gate`), its output is read. Elsewhere
    (OLMoE, Mixtral, Qwen and others before transformers 5.6, which overwrote them) their scale is lost: no
    z-loss can be told, and a softmax of what is returned is no distribution of the router's.
    """
    if returns_logits(router):
        return {}
    found = logits_module(router, class_count(router, experts))
    if found is None:
        note = (
            "the router returns no logits (before transformers 5.6 many gave probabilities in their place): "
            "router entropy, confidence and z-loss are absent; the counts do not need them"
        )
        return {"read": read_without_logits, "notes": (note,)}
    name, watched = found
    note = f"the router returns no logits: they are read inside it, from the output of `{name}`"
    return {"watched": watched, "read": read_watched_logits, "notes": (note,)}


def choice_inside(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Aria before its experts were handed an index: they are handed the logits, and choose themselves."""
    if not chooses_itself(experts):
        return {}
    config = getattr(experts, "config", None)
    return {"read": choice_inside_reader(experts), "top_k": int_attribute(config, "moe_topk")}


def identity_experts(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """LongCat-Flash: the last indices are experts without weights, which return their input."""
    rows = expert_rows(experts)
    if len(rows) < 2:
        return {}
    identities = rows[-1] - rows[0]
    note = f"the last {identities} of {rows[-1]} experts are identities: assignments without FLOPs"
    return {"num_experts": rows[-1], "identity_experts": identities, "notes": (note,)}


def skip_class(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Zaya: one more class than experts. The router rewrites it to expert 0 with a weight of exactly 0."""
    classes = int_attribute(router, "num_router_classes")
    if classes <= int_attribute(router, "num_experts"):
        return {}
    note = (
        f"{classes} logits: the last means that the token skips the experts; a skip is counted in `skipped`, "
        "and its FLOPs are spent all the same, on expert 0"
    )
    return {"notes": (note,)}


RULES: tuple[Rule, ...] = (
    hash_router,
    no_logits_returned,
    choice_inside,
    identity_experts,
    skip_class,
)


TOPK_EXPERTS = Contract(
    name="topk-experts",
    description="router -> (logits, weights, index); experts(hidden_states, index, weights)",
    find=find_topk_experts,
    read=read_topk_experts,
    reads_late=True,
    columns={read_topk_experts: topk_columns, read_without_logits: choice_columns},
    combine=combine_experts_calls,
)
