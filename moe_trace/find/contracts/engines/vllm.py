"""Contract `vllm-fused-moe`: vLLM's `MoERunner`, recognized by its structure without importing vLLM.

The runner calls `router.select_experts(hidden_states=, router_logits=)`, and passes the result to
`routed_experts.forward_modular(x=, topk_weights=, topk_ids=)`. Neither is a module call, so both methods are
redirected through a module, a tap, that forward hooks can observe. The gate's own call is not included: on
devices other than the CPU it may run in compiled code, or be fused, while both methods run in the operator
`vllm::moe_forward`.

Shape suffixes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch, Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.engines.physical_experts import experts_of_slots, logical_ids, slots_of_call
from moe_trace.find.contracts.modules import described, int_attribute, require_2d

_CHOICE, _EXPERTS, _MONOLITHIC = "select_experts", "forward_modular", "forward_monolithic"
_NEEDS = {
    _CHOICE: ("router_logits",),
    _EXPERTS: ("x", "topk_weights", "topk_ids"),
    _MONOLITHIC: ("router_logits",),
}
"""Arguments that are read, by method."""
_NOTE = "the router's time is that of choosing (select_experts): its gate's product is no part of it"


class Tap(nn.Module):
    """A module through which calls of a vLLM method are redirected.

    Its `redirect` is put into the owner's `__dict__`, so that the owner's modules and state do not change.

    Args:
        owner: object that has the method.
        name: name of the method.
        holds: module whose parameters become those of the tap, such as the router's gate.
    """

    method: Callable[..., Any]

    def __init__(self, owner: Any, name: str, holds: nn.Module | None) -> None:
        super().__init__()
        self.held = holds
        object.__setattr__(self, "method", getattr(owner, name))
        self.names = tuple(inspect.signature(self.method).parameters)

    def redirect(self, *args: Any, **kwargs: Any) -> Any:
        """Replace the method: call the tap with the method's arguments."""
        raise NotImplementedError

    def _named(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class RouterTap(Tap):
    """`select_experts` in the form of a router module that returns (logits, weights, ids)."""

    def redirect(self, *args: Any, **kwargs: Any) -> Any:
        return self(self._named(args, kwargs))[1:]

    def forward(self, given: dict[str, Any]) -> Any:
        weights, ids = self.method(**given)
        return given["router_logits"], weights, ids


class ExpertsTap(Tap):
    """`forward_modular` in the form of an experts module, called with (x, ids, weights, other arguments)."""

    def redirect(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._named(args, kwargs)
        x, weights, ids = arguments.pop("x"), arguments.pop("topk_weights"), arguments.pop("topk_ids")
        return self(x, ids, weights, arguments)

    def forward(self, x: Any, ids: Any, weights: Any, others: dict[str, Any]) -> Any:
        return self.method(x=x, topk_weights=weights, topk_ids=ids, **others)


class MonolithicTap(Tap):
    """`forward_monolithic`, whose kernel chooses the experts and runs them, so assignments are unknown."""

    def redirect(self, *args: Any, **kwargs: Any) -> Any:
        return self(self._named(args, kwargs))

    def forward(self, given: dict[str, Any]) -> Any:
        return self.method(**given)


def is_runner(module: nn.Module) -> bool:
    """Return whether a module has the structure of vLLM's `MoERunner`."""
    experts = getattr(module, "routed_experts", None)
    return (
        isinstance(experts, nn.Module)
        and callable(getattr(experts, _EXPERTS, None))
        and callable(getattr(getattr(module, "router", None), _CHOICE, None))
    )


def find_vllm(block: nn.Module) -> list[Found]:
    """Find the runners among a block's children and install taps on them, which `remove_taps` removes."""
    return [_found(block, name, child) for name, child in block.named_children() if is_runner(child)]


def _found(block: nn.Module, name: str, runner: Any) -> Found:
    in_block = ((path, getattr(block, path, None)) for path in ("gate", "router"))
    gates = (*in_block, (f"{name}.gate", getattr(runner, "gate", None)))
    path, gate = next(((p, g) for p, g in gates if isinstance(g, nn.Module)), (f"{name}.router", None))
    experts, config = runner.routed_experts, getattr(runner, "moe_config", None)
    fields: dict[str, Any] = {
        "router_path": path,
        "block": runner,
        "num_experts": int_attribute(config, "num_experts") or int_attribute(experts, "global_num_experts"),
        "top_k": int_attribute(config, "experts_per_token") or int_attribute(experts, "top_k"),
        "gate": gate,
        "weights": (experts,),
        "notes": (_NOTE,),
    }
    if getattr(runner, "is_monolithic", False):
        router = _tap(MonolithicTap, experts, _MONOLITHIC, gate)
        return Found(router=router, experts=None, read=_monolithic, **fields)
    if getattr(runner, "eplb_state", None) is not None:
        fields |= _balanced(runner, fields)
    router = _tap(RouterTap, runner.router, _CHOICE, gate)
    return Found(router=router, experts=_tap(ExpertsTap, experts, _EXPERTS, None), **fields)


def _balanced(runner: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that differ under a load balancer, where experts receive slot ids with replicas."""
    slots = fields["num_experts"]
    experts = int_attribute(runner.moe_config, "num_logical_experts") or slots
    note = (
        f"{experts} experts on {slots} physical slots (EPLB): loads are of experts, those of an expert's "
        "replicas added up; what each slot got stands apart"
    )
    return {
        "num_experts": experts,
        "num_slots": slots,
        "notes": (*fields["notes"], note),
        "read": partial(read_balanced, runner=runner, num_slots=slots),
    }


def _tap(kind: type[Tap], owner: Any, name: str, holds: nn.Module | None) -> Tap:
    installed = getattr(owner.__dict__.get(name), "__self__", None)
    if isinstance(installed, Tap):
        return installed
    # The tap has the name of the owner's class, which is the one that users know.
    tap = type(type(owner).__name__, (kind,), {})(owner, name, holds)
    if missing := [argument for argument in _NEEDS[name] if argument not in tap.names]:
        raise AdapterMismatch(
            f"expected {type(owner).__name__}.{name} to take {', '.join(missing)}; "
            f"it takes {', '.join(tap.names)}"
        )
    owner.__dict__[name] = tap.redirect
    return tap


def remove_taps(model: nn.Module) -> None:
    """Restore the methods that `find_vllm` redirected; hooks left on the taps are no longer called."""
    for runner in model.modules():
        if is_runner(runner):
            for owner in (runner.router, runner.routed_experts):
                for name in _NEEDS:
                    if isinstance(getattr(owner.__dict__.get(name), "__self__", None), Tap):
                        del owner.__dict__[name]


def read_vllm(call: Call) -> RouterOutput:
    """Read ids and weights as the experts received them, and the logits that the router received."""
    arguments, output = call.experts_args, call.router_output
    if arguments is None or len(arguments) < 3:
        raise AdapterMismatch("expected forward_modular to follow select_experts; it was not called")
    index, weights, logits = arguments[1], arguments[2], output[0]
    require_2d("topk_ids", index, integer=True)
    require_2d("topk_weights", weights)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != index.shape[0]:
        raise AdapterMismatch(
            f"expected logits [T, E] beside topk_ids [T, K], found {described(logits)}, {described(index)}"
        )
    return RouterOutput(index, weights, logits)


def read_balanced(call: Call, *, runner: Any, num_slots: int) -> RouterOutput:
    """Read a call, mapping slot ids back to experts as its forward ends: the map changes between forwards."""
    found, state = read_vllm(call), runner.eplb_state
    slots_ER = getattr(state, "logical_to_physical_map", None)
    if isinstance(slots_ER, Tensor):  # if not, the balancer has not started, and ids are those of experts
        expert_P1 = experts_of_slots(slots_ER, num_slots)
        found.slots_2P = slots_of_call(found.index_TK, found.weights_TK, expert_P1)
        found.index_TK = logical_ids(found.index_TK, expert_P1)
    return found


def vllm_columns(outputs: Sequence[Any], experts_args: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Read many calls like `read_vllm`."""
    return (
        [arguments[1] for arguments in experts_args],
        [arguments[2] for arguments in experts_args],
        [output[0] for output in outputs],
    )


def _monolithic(call: Call) -> RouterOutput:
    raise AdapterMismatch(
        "vLLM runs this layer with a monolithic kernel, which chooses the experts inside itself; "
        "another MoE backend (--moe-backend) has them chosen outside"
    )


_columns: dict[Callable[[Call], RouterOutput], Any] = {read_vllm: vllm_columns}
VLLM_FUSED_MOE = Contract(
    name="vllm-fused-moe",
    description="vLLM: router.select_experts(router_logits=); routed_experts.forward_modular(topk_ids=)",
    find=find_vllm,
    read=read_vllm,
    reads_late=True,
    columns=_columns,
)
