"""Registry of contracts, to which users can add their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moe_trace.data.errors import UsageError
from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.doge import PRODUCT_KEY
from moe_trace.find.contracts.engines.sglang import SGLANG_TOPK
from moe_trace.find.contracts.engines.vllm import VLLM_FUSED_MOE
from moe_trace.find.contracts.jetmoe import SORTED_DISPATCH
from moe_trace.find.contracts.llama4 import DENSE_SCORES
from moe_trace.find.contracts.modules import (
    class_name,
    expert_modules,
    expert_rows,
    int_attribute,
    unwrapped,
)
from moe_trace.find.contracts.olmoe_mixtral_qwen import TOPK_EXPERTS
from moe_trace.find.contracts.shared_experts import experts_beside, looks_like_experts, with_experts
from moe_trace.find.contracts.switch_nllb import ONE_HOT
from moe_trace.find.structure.router_beside_experts import ROUTER_BESIDE_EXPERTS

# In order of precedence: the first contract that finds a router reads it.
CONTRACTS: list[Contract] = [
    ONE_HOT,
    PRODUCT_KEY,
    SORTED_DISPATCH,
    DENSE_SCORES,
    SGLANG_TOPK,
    VLLM_FUSED_MOE,
    TOPK_EXPERTS,
    ROUTER_BESIDE_EXPERTS,
]

_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts")
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "k")


def register_adapter(
    name: str,
    *,
    read: Callable[[Call], RouterOutput],
    router: type[nn.Module] | str | None = None,
    block: type[nn.Module] | str | None = None,
    experts: str | None = None,
    watch: str | None = None,
    find: Callable[[nn.Module], list[Found]] | None = None,
    description: str = "",
) -> Contract:
    """Register an adapter for a kind of router. It takes precedence over all adapters registered so far.

    Args:
        name: name of the adapter in traces and tables.
        read: function that reads a `RouterOutput(index_TK, weights_TK, logits_TE)` from one call. It runs
            when the model's forward ends and must not synchronize with the device (no `.item()`,
            `.tolist()`, `nonzero`). If it raises, the call is counted as lost, and the model continues.
        router: class of the router module, or its name. An instance of a torch.nn class is a router only if
            its block has experts that match it. With `block`: path of the router inside the block.
        block: class of the module that holds router and experts, or its name, if the router has no class of
            its own: `block=MyMoE, router="gate"`.
        experts: name of the experts module, a sibling of the router, whose arguments `read` finds in
            `call.experts_args`. A router call ends when they are called; without `experts`, on return.
        watch: path of a module inside the router, whose output `read` finds in `call.watched_output`.
        find: function that returns the routers found at one module; replaces `router`.
        description: the interface between router and experts.

    Raises:
        UsageError: the name is taken, or `router`, `block` and `find` do not fit together.
    """
    _refuse_unfit(name, router, block, find)
    if find is None:
        assert router is not None
        find = _RouterBesideExperts(
            name=name, router=router, block=block, experts=experts, watch=watch, read=read
        )
    contract = Contract(name=name, description=description or name, find=find, read=read)
    CONTRACTS.insert(0, contract)
    return contract


def _refuse_unfit(name: str, router: object, block: object, find: object) -> None:
    if block is not None and not isinstance(router, str):
        raise UsageError(f'expected router= as a path inside block=, such as "gate", found {router!r}')
    if (router is None) is (find is None):
        raise UsageError("expected one of router= (a class) and find= (a function), found both or neither")
    if any(contract.name == name for contract in CONTRACTS):
        taken = ", ".join(contract.name for contract in CONTRACTS)
        raise UsageError(f"an adapter named {name!r} is already registered; the names taken are {taken}")


def unregister_adapter(name: str) -> None:
    """Remove an adapter.

    Raises:
        UsageError: no adapter has that name.
    """
    known = [contract for contract in CONTRACTS if contract.name == name]
    if not known:
        raise UsageError(f"no adapter named {name!r}; known are {', '.join(c.name for c in CONTRACTS)}")
    CONTRACTS.remove(known[0])


@dataclass(frozen=True, kw_only=True)
class _RouterBesideExperts:
    """`find` function of an adapter that was registered by the router's class."""

    name: str
    router: type[nn.Module] | str
    block: type[nn.Module] | str | None
    experts: str | None
    watch: str | None
    read: Callable[[Call], RouterOutput]

    def __call__(self, block: nn.Module) -> list[Found]:
        children = dict(block.named_children())
        if self.experts is not None and self.experts not in children:
            return []
        if self.block is not None:
            path = self.router
            assert isinstance(path, str)
            return [self._found(block, path, children)] if _is_instance(block, self.block) else []
        found = [
            self._found(block, name, children)
            for name, child in children.items()
            if _is_instance(unwrapped(child), self.router)
        ]
        if isinstance(self.router, type) and self.router.__module__.startswith("torch.nn."):
            found = [item for item in found if item.experts is not None or with_experts(item).weights]
        return found

    def _found(self, block: nn.Module, path: str, children: dict[str, nn.Module]) -> Found:
        given = block.get_submodule(path)
        router = unwrapped(given)
        experts = children[self.experts] if self.experts is not None else None
        declared = int_attribute(router, *_NUM_EXPERTS) or int_attribute(block, *_NUM_EXPERTS)
        holder = experts if experts is not None else experts_beside(children, given, declared)
        inner = unwrapped(holder) if holder is not None else None
        rows = 0 if inner is None else len(expert_modules(inner)) or max(expert_rows(inner), default=0)
        inside = [
            path for path, module in router.named_modules() if path and looks_like_experts(path, module)
        ]
        return Found(
            router=given,
            router_path=path,
            experts=experts,
            block=None if inside else block,
            num_experts=declared or rows,
            top_k=int_attribute(router, *_TOP_K) or int_attribute(block, *_TOP_K),
            watched=router.get_submodule(self.watch) if self.watch is not None else None,
            shared=() if inside else None,
            read=None if declared or rows else self._read_with_logits,
            notes=(self._holds_experts(router, inside[0]),) if inside else (),
        )

    def _holds_experts(self, router: nn.Module, experts: str) -> str:
        gate = self.watch or "gate"
        return (
            f"the router of {self.name!r} is {class_name(router)}, which holds its experts ({experts}): "
            "their time and FLOPs count as the router's. Name the gate instead: register_adapter(..., "
            f'block={class_name(router)}, router="{gate}")'
        )

    def _read_with_logits(self, call: Call) -> RouterOutput:
        reading = self.read(call)
        if reading.logits_TE is None:
            raise AdapterMismatch(
                "cannot tell the number of experts: give the router or its block an attribute "
                "`num_experts`, or let `read` return logits [T, E]"
            )
        return reading


def _is_instance(module: nn.Module, wanted: type[nn.Module] | str) -> bool:
    return class_name(module) == wanted if isinstance(wanted, str) else isinstance(module, wanted)
