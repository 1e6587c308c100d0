"""Contract `topk-experts`: `experts(hidden_states, index, weights)`, used by nearly every family.

The experts module receives the assignments, however they were made: from logits or biased scores, within
groups, by a table, in the router or (DBRX) in the block. The router's own output is only needed for logits.
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
"""`rule(router, experts)` -> fields of `Found` that a family sets differently; empty for other families."""


def is_topk_experts(module: nn.Module) -> bool:
    """Return whether the module inside wrappers is called as `experts(hidden_states, index, weights)`."""
    parameters = forward_parameters(unwrapped(module))
    return len(parameters) >= 3 and parameters[1] in INDEX_ARGUMENTS


def chooses_itself(module: nn.Module) -> bool:
    """Return whether the module is called as `experts(hidden_states, router_logits)` and chooses experts."""
    experts = unwrapped(module)
    return forward_parameters(experts) == [HIDDEN_ARGUMENT, "router_logits"] and callable(
        getattr(experts, "route_tokens_to_experts", None)
    )


def find_topk_experts(block: nn.Module) -> list[Found]:
    """Find a block with an experts module, recognized by its signature, and a router among its children."""
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
        # Router and experts are children of the decoder layer, next to its dense MLP: no block to time.
        fields |= {"block": None, "shared": tuple(children[name] for name in ("mlp",) if name in children)}
    for rule in RULES:
        fields |= rule(router, unwrapped(experts))
    return [Found(**fields)]


def router_beside(children: dict[str, nn.Module]) -> str | None:
    """Return the name of the child that is a router, by name or else class name; None if ambiguous."""
    named = [name for name in ROUTER_NAMES if name in children]
    if not named:
        classes = {name: type(unwrapped(child)).__name__ for name, child in children.items()}
        named = [name for name, class_name in classes.items() if _ROUTER_CLASS.search(class_name)]
    return named[0] if len(named) == 1 else None


def class_count(router: nn.Module, experts: nn.Module) -> int:
    """Return E: the largest count, since `experts.num_experts` is the local one under expert parallelism."""
    return max(
        int_attribute(router, "num_experts", "n_routed_experts"),
        int_attribute(experts, "num_experts"),
        max(expert_rows(experts), default=0),
    )


def slot_count(router: nn.Module, block: nn.Module) -> int:
    """Return K, or 0 if it is not known before a call."""
    config = getattr(router, "config", None)
    return (
        int_attribute(router, "top_k")
        or int_attribute(block, "top_k")
        or int_attribute(config, "top_k_experts", "num_experts_per_tok", "moe_topk", "moe_top_k")
    )


# -- rules for families that deviate -------------------------------------------------------------------


def hash_router(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Handle DeepSeek-V4's hash layers: a table of token ids chooses experts; logits give the weights."""
    if not hasattr(router, "tid2eid"):
        return {}
    note = "chosen by a table of token ids: no logits decide, so entropy, confidence and z-loss are empty"
    return {"read": read_without_logits, "notes": (note,)}


def no_logits_returned(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Handle routers that do not return logits first; see `returns_logits`.

    If a module inside computes them (Gemma 4's `proj`, AFMoE's `gate`), its output is read. Otherwise (OLMoE,
    Mixtral, Qwen and others before transformers 5.6, which overwrote them) their scale is lost: there is no
    z-loss, and a softmax of the returned values is not the router's distribution.
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
    """Handle older versions of Aria, whose experts receive the logits and choose by themselves."""
    if not chooses_itself(experts):
        return {}
    config = getattr(experts, "config", None)
    return {"read": choice_inside_reader(experts), "top_k": int_attribute(config, "moe_topk")}


def identity_experts(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Handle LongCat-Flash, whose last experts have no weights and return their input."""
    rows = expert_rows(experts)
    if len(rows) < 2:
        return {}
    identities = rows[-1] - rows[0]
    note = f"the last {identities} of {rows[-1]} experts are identities: assignments without FLOPs"
    return {"num_experts": rows[-1], "identity_experts": identities, "notes": (note,)}


def skip_class(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Handle Zaya, which has an extra class that the router rewrites to expert 0 with weight exactly 0."""
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
