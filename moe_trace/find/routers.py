"""Discovery of the Mixture-of-Experts routers of a model."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from moe_trace.data.errors import NoRoutersFound, UsageError
from moe_trace.data.layer_labels import layer_labels
from moe_trace.data.schema import RouterInfo
from moe_trace.find.contracts import Call, Contract, Found, RouterOutput
from moe_trace.find.contracts.modules import class_name, unwrapped
from moe_trace.find.contracts.shared_experts import (
    shared_modules,
    unread_experts,
    with_experts,
)
from moe_trace.find.device_mesh import DataParallelDims, held_experts
from moe_trace.find.flops import (
    dense_flops_per_token,
    expert_bytes,
    expert_flops_per_slot,
    parameter_count,
    projection_note,
    router_flops_per_token,
)
from moe_trace.find.registry import CONTRACTS
from moe_trace.find.structure.router_beside_experts import describe_unread

LayerSelector = Sequence[int | str] | Callable[["RouterSite"], bool] | None


@dataclass(frozen=True, kw_only=True)
class RouterSite(Found):
    """A router, with the modules to register hooks on and the contract that reads its calls."""

    info: RouterInfo
    contract: Contract
    read: Callable[[Call], RouterOutput]
    """Function that reads one call of this router; see `Contract.read`."""
    shares_router: bool = False
    """Whether other layers call the same router; a call then belongs to the layer whose block runs."""

    @property
    def site(self) -> str:
        """Label in the trace, e.g. `L03`."""
        return self.info.site

    @property
    def name(self) -> str:
        """Path of the router module in the model, e.g. `model.layers.3.mlp.gate`."""
        return self.info.name

    @property
    def layer(self) -> int:
        """Index of the layer, from the module path."""
        return self.info.layer


def find_routers(model: nn.Module, *, layers: LayerSelector = None) -> list[RouterSite]:
    """Return the routers of `model` in the order of its modules.

    Args:
        layers: routers to select: layer indices (`[0, 3]`), labels or module paths (`["L03"]`), or a
            predicate on the `RouterSite`. None selects all.

    Raises:
        NoRoutersFound: the model has no router that a known contract reads.
        UsageError: `layers` selects no router, or names one that does not exist.
    """
    found = _without_shared_experts(list(_walk(model)))
    unread = unread_experts(model, [item for _, _, item in found])
    if not found:
        raise NoRoutersFound(_no_routers_message(model, unread))
    if unread:
        warnings.warn(
            f"{len(unread)} modules look like routed experts and fit no known adapter: "
            f"{describe_unread(model, unread)}. Their routing is not recorded; moe_trace.register_adapter "
            "teaches one",
            RuntimeWarning,
            stacklevel=2,
        )
    return select_sites(_sites(model, found), layers)


def _walk(model: nn.Module) -> Iterable[tuple[str, Contract, Found]]:
    """Yield (path of the inspected module, contract, router that it found there) in module order.

    The first contract that finds a router at a module is used; modules inside a router are not routers. A
    router that several layers share is found in each.
    """
    seen: set[int] = set()
    layers: dict[int, list[Found]] = {}
    for path, module in model.named_modules():
        for contract in CONTRACTS:
            found = [
                item
                for item in contract.find(module)
                if id(item.router) not in seen or _is_another_layer(item, layers.get(id(item.router), []))
            ]
            for item in found:
                seen.update(map(id, item.router.modules()))
                layers.setdefault(id(item.router), []).append(item)
                yield path, contract, with_experts(item)
            if found:
                break


def _is_another_layer(item: Found, others: Sequence[Found]) -> bool:
    """Return whether `item` has its own block and experts, distinct from other layers' with this router."""
    if item.block is None or not others:
        return False
    parts, experts = set(item.block.modules()), set(_weights(item))
    return all(
        other.block not in parts and item.block not in set(other.block.modules())
        for other in others
        if other.block is not None
    ) and experts.isdisjoint(part for other in others for part in _weights(other))


def _without_shared_experts(
    found: list[tuple[str, Contract, Found]],
) -> list[tuple[str, Contract, Found]]:
    """Do not count rows that enter experts shared by several routers, since their router is unknown."""
    users = Counter(id(expert) for _, _, item in found for expert in item.listed)
    return [
        (path, contract, replace(item, listed=()) if any(users[id(e)] > 1 for e in item.listed) else item)
        for path, contract, item in found
    ]


def _sites(model: nn.Module, found: list[tuple[str, Contract, Found]]) -> list[RouterSite]:
    names = [f"{path}.{item.router_path}".lstrip(".") for path, _, item in found]
    data_parallel = DataParallelDims(model)
    sites, callers = [], Counter(id(item.router) for _, _, item in found)
    counted: set[int] = set()  # two routers of a layer may have shared experts in common (ernie4_5_vl_moe)
    for (path, contract, item), name, label in zip(found, names, layer_labels(names), strict=True):
        shared = shared_modules(model, path, item)
        info = _info(name, label, contract, item, shared, data_parallel)
        info.parameters["shared"] = parameter_count(m for m in shared if id(m) not in counted)
        counted.update(map(id, shared))
        fields = vars(item) | {"read": item.read or contract.read}
        sites.append(
            RouterSite(**fields, info=info, contract=contract, shares_router=callers[id(item.router)] > 1)
        )
    return sites


def _info(
    name: str,
    label: tuple[str, int],
    contract: Contract,
    item: Found,
    shared: tuple[nn.Module, ...],
    data_parallel: DataParallelDims,
) -> RouterInfo:
    site, layer = label
    weights, gate = _weights(item), item.gate or item.router
    note = projection_note(item, shared)
    return RouterInfo(
        site=site,
        name=name,
        layer=layer,
        router_class=class_name(unwrapped(item.router)),
        experts_class=class_name(unwrapped(weights[0])) if weights else None,
        contract=contract.name,
        num_experts=item.num_experts,
        top_k=item.top_k,
        num_slots=item.num_slots,
        router_flops_per_token=router_flops_per_token(gate),
        expert_flops_per_slot=expert_flops_per_slot(weights, item.num_experts),
        shared_flops_per_token=sum(map(dense_flops_per_token, shared)),
        parameters={"router": parameter_count([gate]), "experts": parameter_count(weights)},
        held_experts=held_experts(weights, item.num_slots or item.num_experts, data_parallel),
        expert_bytes=expert_bytes(weights, item.num_experts - item.identity_experts, data_parallel),
        identity_experts=item.identity_experts,
        every_expert_computes=item.every_expert_computes,
        notes=item.notes if note is None else (*item.notes, note),
    )


def _weights(item: Found) -> tuple[nn.Module, ...]:
    return item.weights or ((item.experts,) if item.experts is not None else ())


def select_sites(sites: list[RouterSite], layers: LayerSelector) -> list[RouterSite]:
    """Return the routers that `layers` selects; see `find_routers`."""
    if layers is None:
        return sites
    if callable(layers):
        chosen = [site for site in sites if layers(site)]
    else:
        selected = set(layers)
        unknown = selected - {key for site in sites for key in (site.layer, site.site, site.name)}
        if unknown:
            raise UsageError(
                f"layers= names {sorted(map(str, unknown))}, but the routers found are "
                f"{', '.join(f'{s.site} ({s.name})' for s in sites)}; give layer indices, labels or paths"
            )
        chosen = [site for site in sites if selected & {site.layer, site.site, site.name}]
    if not chosen:
        raise UsageError(f"layers= selects none of the {len(sites)} routers found; pass None for all")
    return chosen


def transformers_release(module: nn.Module) -> str | None:
    """Return the version of transformers if the module is an instance of one of its classes, else None."""
    package = sys.modules.get("transformers")
    of_transformers = any(
        base.__module__.startswith("transformers.") for base in type(unwrapped(module)).__mro__
    )
    return str(package.__version__) if package is not None and of_transformers else None


def _no_routers_message(model: nn.Module, unread: list[tuple[str, nn.Module]]) -> str:
    name = type(unwrapped(model)).__name__
    known = "; ".join(f"{contract.name}: {contract.description}" for contract in CONTRACTS)
    if unread:
        advice = (
            f"{len(unread)} modules look like routed experts and follow none of them: "
            f"{describe_unread(model, unread)}. Teach it with moe_trace.register_adapter, then check with "
            "`moe-trace routers MODEL`"
        )
    else:
        advice = (
            "Nothing in it looks like routed experts: in a dense model there is nothing to trace. "
            "`moe-trace routers MODEL` lists the routers of any other model, and "
            "moe_trace.register_adapter teaches one of your own"
        )
    return f"found 0 routers in {name}; known adapters: {known}. {advice}"
