"""The contracts that are known, and how a user adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moe_trace.data.errors import UsageError
from moe_trace.find.contracts.contract import Call, Contract, ContractMismatch, Found, Reading
from moe_trace.find.contracts.dense_scores import DENSE_SCORES
from moe_trace.find.contracts.modules import expert_modules, expert_rows, int_attribute, unwrapped
from moe_trace.find.contracts.one_hot import ONE_HOT
from moe_trace.find.contracts.product_key import PRODUCT_KEY
from moe_trace.find.contracts.sorted_dispatch import SORTED_DISPATCH
from moe_trace.find.contracts.topk_experts import TOPK_EXPERTS

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
        read: turns one call into a `Reading(index_TK, weights_TK, logits_TE)`. It runs when the model's
            forward ends and must not wait for the device (no `.item()`, `.tolist()`, `nonzero`). What it
            raises is counted as lost, and the model runs on.
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
        find = _RouterBesideExperts(router=router, experts=experts, watch=watch, read=read)
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


@dataclass(frozen=True, kw_only=True)
class _RouterBesideExperts:
    """`find` of a contract that a user registered by the router's class."""

    router: type[nn.Module] | str
    experts: str | None
    watch: str | None
    read: Callable[[Call], Reading]

    def __call__(self, block: nn.Module) -> list[Found]:
        children = dict(block.named_children())
        if self.experts is not None and self.experts not in children:
            return []
        return [
            self._found(block, name, children) for name, child in children.items() if self._is_router(child)
        ]

    def _is_router(self, module: nn.Module) -> bool:
        inner = unwrapped(module)
        if isinstance(self.router, str):
            return type(inner).__name__ == self.router
        return isinstance(inner, self.router)

    def _found(self, block: nn.Module, name: str, children: dict[str, nn.Module]) -> Found:
        router = unwrapped(children[name])
        experts = children[self.experts] if self.experts is not None else None
        inner = unwrapped(experts) if experts is not None else None
        rows = 0 if inner is None else len(expert_modules(inner)) or max(expert_rows(inner), default=0)
        told = int_attribute(router, *_NUM_EXPERTS) or int_attribute(block, *_NUM_EXPERTS) or rows
        return Found(
            router=children[name],
            router_path=name,
            experts=experts,
            block=block,
            num_experts=told,
            top_k=int_attribute(router, *_TOP_K) or int_attribute(block, *_TOP_K),
            watched=router.get_submodule(self.watch) if self.watch is not None else None,
            read=None if told else self._read_with_logits,
        )

    def _read_with_logits(self, call: Call) -> Reading:
        reading = self.read(call)
        if reading.logits_TE is None:
            raise ContractMismatch(
                "cannot tell the number of experts: give the router or its block an attribute "
                "`num_experts`, or let `read` return logits [T, E]"
            )
        return reading
