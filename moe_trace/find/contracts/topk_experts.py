"""topk-experts: `experts(hidden_states, index, weights)`, the contract of nearly every family.

What the experts module receives is the decision, whichever way the router came to it: by logits, by biased
scores, within groups, by a table, in the router or (DBRX) in the block. The router's own output is needed for
the logits alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import Call, Contract, ContractMismatch, Found, Reading
from moe_trace.find.contracts.fused_block import fused_block_reader
from moe_trace.find.contracts.modules import (
    described,
    expert_rows,
    forward_parameters,
    int_attribute,
    require_2d,
    unwrapped,
)
from moe_trace.find.contracts.several_calls import combined_choice

# The name of the second argument of an experts module's forward, in every family of transformers 5 whose
# index is [T, K]. (`router_mask`, NLLB's, is a mask over all experts.)
INDEX_ARGUMENTS = frozenset({"top_k_index", "router_indices", "selected_experts"})
_HIDDEN = "hidden_states"
ROUTER_NAMES = ("gate", "router")
_ROUTER_CLASS = re.compile(r"Router|Gat(e|ing)$|TopK")
# `x = F.softmax(x, ...)` in the code of a router that returns `x` first.
_SOFTMAXED = re.compile(r"\b(\w+) = [\w.]*softmax\(\s*\1\b.*\breturn \1\b", re.DOTALL)

Rule = Callable[[nn.Module, nn.Module], dict[str, Any]]
"""`rule(router, experts)` -> what a family sets differently in `Found`; nothing if it is none of it."""


def is_topk_experts(module: nn.Module) -> bool:
    """Whether the module is called as `experts(hidden_states, index, weights)`; wrappers are seen through."""
    parameters = forward_parameters(unwrapped(module))
    return len(parameters) >= 3 and parameters[1] in INDEX_ARGUMENTS


def find_topk_experts(block: nn.Module) -> list[Found]:
    """A block whose children are an experts module, told by its signature, and the router beside it."""
    children = dict(block.named_children())
    experts_names = [name for name, child in children.items() if is_topk_experts(child)]
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


def probabilities(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """Gemma 4 returns softmax probabilities; its true logits are the output of `router.proj`."""
    if not (hasattr(router, "proj") and hasattr(router, "per_expert_scale")):
        return {}
    note = "the router returns probabilities: its logits are read inside it, from the output of `proj`"
    return {"watched": router.get_submodule("proj"), "read": read_watched_logits, "notes": (note,)}


def softmaxed_logits(router: nn.Module, experts: nn.Module) -> dict[str, Any]:
    """OLMoE, Mixtral, Qwen and others before transformers 5.6 overwrite their logits with probabilities.

    What they return has lost the logits' scale: no z-loss can be told, and a softmax of it is no distribution
    of the router's. Told from the code, since it depends on the version and on whose copy the router is.
    """
    try:
        source = inspect.getsource(type(router).forward)
    except (OSError, TypeError):
        return {}
    if not _SOFTMAXED.search(source):
        return {}
    note = (
        "the router returns probabilities where its logits are expected, as transformers did before 5.6: "
        "router entropy, confidence and z-loss are absent; the counts do not need them"
    )
    return {"read": read_without_logits, "notes": (note,)}


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


RULES: tuple[Rule, ...] = (hash_router, probabilities, softmaxed_logits, identity_experts, skip_class)


# -- reading -------------------------------------------------------------------------------------------


def read_topk_experts(call: Call) -> Reading:
    """Index and weights as the experts received them: the true assignments. Logits from the router."""
    given, logits = call.experts_args, _logits(call)
    if given is not None and len(given) == 3:
        # The usual form, checked in the fewest steps: this runs in every call of every router.
        index, weights = given[1], given[2]
        try:
            shape, logits_shape = index.shape, logits.shape
            if (
                shape == weights.shape
                and len(shape) == len(logits_shape) == 2
                and shape[0] == logits_shape[0]
                and logits.is_floating_point()
                and not index.is_floating_point()
            ):
                return Reading(index, weights, logits)
        except AttributeError:
            pass  # not tensors: said below
    return _explain_or_read(call, logits)


def _logits(call: Call) -> Any:
    output = call.router_output
    return output[0] if isinstance(output, tuple) and output else output


def _explain_or_read(call: Call, logits: Any) -> Reading:
    """The same step by step, so that what does not fit can be named."""
    index, weights = _choice(call)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != index.shape[0]:
        raise ContractMismatch(
            f"expected logits [T, E] beside an index [T, K], found {described(logits)} and {described(index)}"
        )
    if not logits.is_floating_point():
        raise ContractMismatch(f"expected logits to be floating-point numbers, found {described(logits)}")
    return Reading(index, weights, logits)


def read_without_logits(call: Call) -> Reading:
    """The decision alone, where logits play no part in it."""
    return Reading(*_choice(call), None)


def read_watched_logits(call: Call) -> Reading:
    """Logits from a module inside the router; None where that was not called as a module."""
    logits = call.watched_output
    index, weights = _choice(call)
    if not isinstance(logits, Tensor):
        return Reading(index, weights, None)
    return Reading(index, weights, logits.reshape(-1, logits.shape[-1]))


def _choice(call: Call) -> tuple[Tensor, Tensor]:
    """(index [T, K], weights [T, K]) of the call."""
    if call.experts_args is None:  # a fused block did not call the experts module: the router's own word
        index, weights = _router_choice(call.router_output)
    else:
        index, weights = _experts_choice(call)
    require_2d("index", index, integer=True)
    require_2d("weights", weights)
    if index.shape != weights.shape:
        raise ContractMismatch(
            f"expected index and weights of one shape [T, K], found {described(index)}, {described(weights)}"
        )
    return index, weights


def _router_choice(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) < 3:
        raise ContractMismatch(
            f"expected the router to return (logits, weights, index), found {described(output)}"
        )
    return output[2], output[1]


def _experts_choice(call: Call) -> tuple[Any, Any]:
    arguments: tuple[Any, ...] = call.experts_args or ()
    named = dict(call.experts_kwargs)
    index_name = next((name for name in named if name in INDEX_ARGUMENTS), None)
    if index_name is not None:  # in whatever order they were named
        index = named.pop(index_name)
        rest = [value for name, value in named.items() if name != _HIDDEN]
        arguments = (None, index, *rest)
    else:
        arguments = (*arguments, *named.values())
    if len(arguments) < 3:
        raise ContractMismatch(
            f"expected experts(hidden_states, index, weights), found {len(arguments)} arguments"
        )
    return arguments[1], arguments[2]


def combine_experts_calls(call: Call, experts_calls: Sequence[Call], top_k: int) -> Call:
    """One decision whose experts were called several times; see `Contract.combine`."""
    logits = _logits(call)
    shape = None
    if isinstance(logits, Tensor) and logits.dim() == 2:
        shape = (logits.shape[0], logits.shape[1])
    index, weights = combined_choice([_choice(one) for one in experts_calls], shape, top_k)
    return Call(call.router_args, call.router_output, (None, index, weights), {}, call.watched_output)


TOPK_EXPERTS = Contract(
    name="topk-experts",
    description="router -> (logits, weights, index); experts(hidden_states, index, weights)",
    find=find_topk_experts,
    read=read_topk_experts,
    reads_late=True,
    combine=combine_experts_calls,
)
