"""Contract `router-beside-experts`: a router and its experts in one block, for any framework.

It covers torchtitan, OLMo-core, NeMo Automodel, Megatron-core, DeepSpeed, the `MoEGate` of remote code, and
blocks with a linear layer as the gate (transformers 4, custom ones). The modules determine the router and the
number of experts; the router's output is read in `reading.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from torch import nn

from moe_trace.find.contracts.contract import Contract, Found
from moe_trace.find.contracts.modules import (
    class_name,
    expert_modules,
    expert_rows,
    forward_parameters,
    int_attribute,
    logits_module,
    unwrapped,
)
from moe_trace.find.structure.reading import read_by_structure

_ROUTER_NAME = re.compile(r"^(gate|router|.*_router)$")
_ROUTER_CLASS = re.compile(r"Router|Gate(V\d+)?$|Gating$|TopK")
_GATE_NAME = re.compile(r"gat(e|ing)|rout|^wg$|switch|select|expert", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_CLASSES = ("num_experts", "n_experts", "n_routed_experts", "num_moe_experts")
_LOCAL_EXPERTS = (*_CLASSES, "num_local_experts", "moe_num_experts")
_CONFIG_TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_router_topk", "moe_topk"),
    *("n_activated_experts", "num_selected_experts", "num_selects", "moe_top_k", "moe_k"),
)
_TOP_K = ("top_k", "topk", "k", *_CONFIG_TOP_K)


def find_router_beside_experts(block: nn.Module) -> list[Found]:
    """Find a block with one router, or one linear gate, and one module of experts."""
    found = _inspect(block)
    return [found] if isinstance(found, Found) else []


def describe_unread(model: nn.Module, unread: Sequence[tuple[str, nn.Module]]) -> str:
    """Describe the first three unread experts: what their block lacks, or else their call signature.

    Args:
        unread: (path, module) of modules that look like routed experts.
    """
    descriptions = dict.fromkeys(_described(model, path, module) for path, module in unread)
    more = f" and {len(descriptions) - 3} more" if len(descriptions) > 3 else ""
    return "; ".join(list(descriptions)[:3]) + more


def _described(model: nn.Module, path: str, module: nn.Module) -> str:
    above = path.rpartition(".")[0]
    block = model.get_submodule(above)
    problem = _inspect(block) if path else None
    if isinstance(problem, str):
        return f"{above or 'the model'} ({class_name(unwrapped(block))}): {problem}"
    called = ", ".join(forward_parameters(unwrapped(module)))
    return f"{path or 'the model'} ({class_name(unwrapped(module))}, called as ({called}))"


def _inspect(block: nn.Module) -> Found | str | None:
    """Return the block's router, or the reason why its experts cannot be read; None without experts."""
    children = {n: c for n, c in block.named_children() if "shared" not in n}
    routers = [name for name, child in children.items() if _is_router(name, unwrapped(child))]
    holders = [n for n, c in children.items() if n not in routers and _holds_experts(n, unwrapped(c))]
    if len(holders) != 1:
        return f"{', '.join(holders)} may each be its experts" if holders else None
    holder = unwrapped(children[holders[0]])
    held = experts_held(holder)
    routers = routers or _gates(children, holder, held)
    if len(routers) != 1:
        return _router_problem(block, routers, held)
    given = children[routers[0]]
    classes = router_classes(unwrapped(given))
    if classes < 2 or classes % held:  # under expert parallelism, ranks hold equal parts
        return f"its router `{routers[0]}` has {classes or 'an unknown number of'} classes for {held} experts"
    return _found(block, routers[0], given, children[holders[0]], classes)


def _found(block: nn.Module, path: str, given: nn.Module, experts: nn.Module, classes: int) -> Found:
    router, is_list = unwrapped(given), isinstance(unwrapped(experts), nn.ModuleList | nn.ModuleDict)
    top_k, inside, listed = _top_k(router, block), logits_module(router, classes), _listed(experts, classes)
    return Found(
        router=given,
        router_path=path,
        experts=None if is_list else experts,
        block=block,
        num_experts=classes,
        top_k=top_k,
        watched=None if inside is None or isinstance(router, nn.Sequential) else inside[1],
        weights=(experts,),
        listed=listed,
        read=partial(
            read_by_structure,
            num_experts=classes,
            top_k=top_k,
            names=() if is_list else tuple(forward_parameters(unwrapped(experts))),
            is_gate=_last_layer(router) is not None,
            gives_logits=_last_layer(router) is (router if not len(router._modules) else _last(router)),
        ),
    )


def _is_router(name: str, module: nn.Module) -> bool:
    named = _ROUTER_NAME.match(name) or _ROUTER_CLASS.search(class_name(module))
    return bool(named) and _last_layer(module) is None and not expert_modules(module)


def _gates(children: dict[str, nn.Module], holder: nn.Module, held: int) -> list[str]:
    """Return the linear layers with one output per expert, without noise layers if there are others."""
    own_forward = not isinstance(holder, nn.ModuleList | nn.ModuleDict)
    if own_forward and not _listed(holder, held) and len(forward_parameters(holder)) < 2:
        return []  # an experts module that receives no assignments has a gate of its own
    gates = [
        name
        for name, child in children.items()
        if _GATE_NAME.search(name)
        and router_classes(unwrapped(child)) == held
        and _last_layer(unwrapped(child))
    ]
    return [name for name in gates if "noise" not in name] or gates


def _router_problem(block: nn.Module, routers: list[str], held: int) -> str:
    if routers:
        return f"{', '.join(routers)} may each be its router"
    weights = [name for name, p in block._parameters.items() if p is not None and held in p.shape]
    if weights:
        return f"its gate is a parameter, `{weights[0]}`, and no module that is called"
    names = ", ".join(name for name, _ in block.named_children())
    return f"no module named gate or router has an output for each of its {held} experts beside it ({names})"


def _last(module: nn.Module) -> nn.Module | None:
    return next(iter(reversed(module._modules.values())), None)


def _last_layer(module: nn.Module) -> nn.Module | None:
    """Return the linear layer that a gate is, or its last layer with weights; None for other modules."""
    if int_attribute(module, "out_features") and int_attribute(module, "in_features"):
        return module
    if not isinstance(module, nn.Sequential):
        return None
    weighted = [child for child in module if any(True for _ in child.parameters())]
    return _last_layer(unwrapped(weighted[-1])) if weighted else None


def _holds_experts(name: str, module: nn.Module) -> bool:
    names = [name, class_name(module), *map(class_name, expert_modules(module)[:1])]
    return any(map(_EXPERTS.search, names)) and experts_held(module) > 0


def _listed(experts: nn.Module, classes: int) -> tuple[nn.Module, ...]:
    """Return the modules that are one expert each; empty if some experts are on other ranks."""
    lists = [found for part in experts.modules() if len(found := expert_modules(part)) == classes]
    return tuple(lists[0]) if len(lists) == 1 else ()


def router_classes(router: nn.Module) -> int:
    """Return E from the router's attributes, or else its linear layers or weight; 0 if unknown."""
    declared = int_attribute(router, *_CLASSES) or int_attribute(getattr(router, "config", None), *_CLASSES)
    last = _last_layer(router)
    if declared or last is not None:
        return declared or int_attribute(last, "out_features")
    linear = {
        int_attribute(unwrapped(c), "out_features")
        for c in router.children()
        if isinstance(unwrapped(c), nn.Linear)
    }
    if len(linear) == 1:  # one layer, or one for the scores and one for their noise
        return linear.pop()
    weight = router._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0


def experts_held(experts: nn.Module) -> int:
    """Return the number of experts that a module holds on this rank, in a list, 3-D weights or attribute."""
    lengths = [len(expert_modules(part)) for part in experts.modules()]
    declared = [int_attribute(part, *_LOCAL_EXPERTS) for part in experts.modules()]
    return max(*lengths, 0) or max(expert_rows(experts), default=0) or max(*declared, 0)


def _top_k(router: nn.Module, block: nn.Module) -> int:
    """Return K from the router or the block; `top_k` in a config is ignored, since it may be for sampling."""
    configs = [getattr(module, "config", None) for module in (router, block)]
    declared = int_attribute(router, *_TOP_K) or int_attribute(block, *_TOP_K)
    return declared or int_attribute(configs[0], *_CONFIG_TOP_K) or int_attribute(configs[1], *_CONFIG_TOP_K)


ROUTER_BESIDE_EXPERTS = Contract(
    name="router-beside-experts",
    description="router -> whole-number ids [.., K] and weights, or a mask over experts, or scores "
    "of experts in a list; told by its form",
    find=find_router_beside_experts,
    read=partial(read_by_structure, num_experts=0, top_k=0),
    reads_late=True,
)
