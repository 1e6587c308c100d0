"""The contracts that are known, and how a user adds one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from moe_trace.contracts.contract import Call, Contract, Found, Reading
from moe_trace.contracts.dense_scores import DENSE_SCORES
from moe_trace.contracts.forms import expert_modules, expert_rows, int_attribute, unwrapped
from moe_trace.contracts.one_hot import ONE_HOT
from moe_trace.contracts.product_key import PRODUCT_KEY
from moe_trace.contracts.sorted_dispatch import SORTED_DISPATCH
from moe_trace.contracts.topk_experts import TOPK_EXPERTS
from moe_trace.errors import UsageError

# In the order in which they are asked; the first to find a router has it.
CONTRACTS: list[Contract] = [ONE_HOT, PRODUCT_KEY, SORTED_DISPATCH, DENSE_SCORES, TOPK_EXPERTS]

_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts")
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "k")


def register_contract(
    name: str,
    *,
    read: Callable[[Call], Reading],
    router: type[nn.Module] | str | None = None,
    experts: str | None = None,
    watch: str | None = None,
    find: Callable[[nn.Module], list[Found]] | None = None,
    description: str = "",
) -> Contract:
    """Teach moe_trace a router that it does not know. It is asked before all contracts known so far.

    Args:
        name: of the contract, as it stands in traces and tables.
        read: turns one call into a `Reading(index_TK, weights_TK, logits_TE)`. It runs inside the user's
            forward and must not wait for the device (no `.item()`, `.tolist()`, `nonzero`).
        router: class of the router module, or the class's name.
        experts: name of the experts module beside the router. Its call ends the decision: `read` finds its
            arguments in `call.experts_args`. Without it, a decision ends with the router's call.
        watch: path of a module inside the router; `read` finds its output in `call.watched_output`.
        find: instead of `router`, for what is not a router beside its experts: looks at one module and
            returns the routers that stand there.
        description: how router and experts speak to each other, in a line.

    Raises:
        UsageError: the name is taken, or not exactly one of `router` and `find` is given.
    """
    if (router is None) is (find is None):
        raise UsageError("expected one of router= (a class) and find= (a function), found both or neither")
    if any(contract.name == name for contract in CONTRACTS):
        taken = ", ".join(contract.name for contract in CONTRACTS)
        raise UsageError(f"a contract named {name!r} is already registered; the names taken are {taken}")
    if find is None:
        assert router is not None
        find = _finder(router, experts, watch)
    contract = Contract(name=name, description=description or name, find=find, read=read)
    CONTRACTS.insert(0, contract)
    return contract


def unregister_contract(name: str) -> None:
    """Forget a contract.

    Raises:
        UsageError: no contract has that name.
    """
    known = [contract for contract in CONTRACTS if contract.name == name]
    if not known:
        raise UsageError(f"no contract named {name!r}; known are {', '.join(c.name for c in CONTRACTS)}")
    CONTRACTS.remove(known[0])


def _finder(
    router: type[nn.Module] | str, experts: str | None, watch: str | None
) -> Callable[[nn.Module], list[Found]]:
    def is_router(module: nn.Module) -> bool:
        inner = unwrapped(module)
        return type(inner).__name__ == router if isinstance(router, str) else isinstance(inner, router)

    def find(block: nn.Module) -> list[Found]:
        children = dict(block.named_children())
        beside = children.get(experts) if experts is not None else None
        if experts is not None and beside is None:
            return []
        return [
            _found(block, name, child, beside, watch) for name, child in children.items() if is_router(child)
        ]

    return find


def _found(
    block: nn.Module, name: str, router: nn.Module, experts: nn.Module | None, watch: str | None
) -> Found:
    inner = unwrapped(router)
    rows = 0
    if experts is not None:
        rows = len(expert_modules(unwrapped(experts))) or max(expert_rows(unwrapped(experts)), default=0)
    return Found(
        router=router,
        router_path=name,
        experts=experts,
        block=block,
        num_experts=int_attribute(inner, *_NUM_EXPERTS) or int_attribute(block, *_NUM_EXPERTS) or rows,
        top_k=int_attribute(inner, *_TOP_K) or int_attribute(block, *_TOP_K),
        watched=inner.get_submodule(watch) if watch is not None else None,
    )
