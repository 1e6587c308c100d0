"""Contracts: how a kind of router is told from its modules, and how one of its calls is read.

A contract is two small functions. `find` looks at one module of a model and answers whether a router of
its kind stands there; `read` turns what the hooks saw in one call into a `Reading`. Adding a family is
adding a contract to `CONTRACTS`.

Shape suffixes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_trace.errors import MoETraceError

# The name of the second argument of an experts module's forward, in every family of transformers 5.
EXPERTS_INDEX_ARGUMENTS = frozenset({"top_k_index", "router_indices", "selected_experts", "router_mask"})
ROUTER_NAMES = ("gate", "router")


class ContractMismatch(MoETraceError):
    """A call of a router has another form than its contract expects."""


@dataclass(slots=True)
class Call:
    """What the hooks saw in one call of a router; `None` for a module that was not called."""

    router_args: tuple[Any, ...] | None = None
    router_output: Any = None
    experts_args: tuple[Any, ...] | None = None
    experts_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Reading:
    """The decision in one call."""

    index_TK: Tensor
    """Integer expert ids; a value outside [0, E) is a skipped slot."""
    weights_TK: Tensor
    """What scales each slot's output; exactly 0 means a skipped slot."""
    logits_TE: Tensor | None
    """The router's true logits, or None where the family has none."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The modules of one router, as a contract sees them. Paths are relative to the module looked at."""

    router: nn.Module
    router_path: str
    experts: nn.Module | None
    block: nn.Module | None
    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One way in which routers and experts speak to each other."""

    name: str
    description: str
    find: Callable[[nn.Module], list[Found]]
    read: Callable[[Call], Reading]


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of the class's forward after self; empty where they cannot be told.

    The class and not the instance: expert parallelism replaces `module.forward` by a wrapper.
    """
    try:
        return list(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        return []


def is_topk_experts(module: nn.Module) -> bool:
    """Whether the module is called as `experts(hidden_states, index, weights)`."""
    parameters = forward_parameters(module)
    return len(parameters) >= 3 and parameters[1] in EXPERTS_INDEX_ARGUMENTS


def find_topk_experts(block: nn.Module) -> list[Found]:
    """A block whose children are an experts module, told by its signature, and the router beside it."""
    children = dict(block.named_children())
    experts = [child for child in children.values() if is_topk_experts(child)]
    routers = [name for name in ROUTER_NAMES if name in children]
    if len(experts) != 1 or len(routers) != 1:
        return []
    router = children[routers[0]]
    num_experts = _first_int(router, "num_experts") or _first_int(experts[0], "num_experts")
    return [
        Found(
            router=router,
            router_path=routers[0],
            experts=experts[0],
            block=block,
            num_experts=num_experts,
            top_k=_first_int(router, "top_k"),
        )
    ]


def _first_int(module: nn.Module, attribute: str) -> int:
    value = getattr(module, attribute, 0)
    return value if isinstance(value, int) else 0


def read_topk_experts(call: Call) -> Reading:
    """Index and weights as the experts received them: the true assignments. Logits from the router."""
    output = call.router_output
    logits = output[0] if isinstance(output, tuple) and output else output
    if call.experts_args is None:  # a fused block did not call the experts module: the router's own word
        index, weights = _router_choice(output)
    else:
        index, weights = _experts_choice(call)
    _require_2d("index", index, integer=True)
    _require_2d("weights", weights)
    _require_2d("logits", logits)
    if index.shape != weights.shape or logits.shape[0] != index.shape[0]:
        raise ContractMismatch(
            f"expected index and weights [T, K] and logits [T, E], found index {_form(index)}, "
            f"weights {_form(weights)}, logits {_form(logits)}"
        )
    return Reading(index, weights, logits)


def _router_choice(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) < 3:
        raise ContractMismatch(
            f"expected the router to return (logits, weights, index), found {_form(output)}"
        )
    return output[2], output[1]


def _experts_choice(call: Call) -> tuple[Any, Any]:
    arguments = (*(call.experts_args or ()), *call.experts_kwargs.values())
    if len(arguments) < 3:
        raise ContractMismatch(
            f"expected experts(hidden_states, index, weights), found {len(arguments)} arguments"
        )
    return arguments[1], arguments[2]


def _require_2d(what: str, value: Any, *, integer: bool = False) -> None:
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise ContractMismatch(f"expected {what} to be a 2-D tensor, found {_form(value)}")
    if integer and (value.is_floating_point() or value.is_complex()):
        raise ContractMismatch(f"expected {what} to be integers, found {_form(value)}")


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} ({', '.join(_form(item) for item in value)})"
    return f"{type(value).__name__}"


TOPK_EXPERTS = Contract(
    name="topk-experts",
    description="router -> (logits, weights, index); experts(hidden_states, index, weights)",
    find=find_topk_experts,
    read=read_topk_experts,
)

CONTRACTS: list[Contract] = [TOPK_EXPERTS]
