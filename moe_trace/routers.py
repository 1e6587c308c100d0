"""Find the Mixture-of-Experts routers of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moe_trace.contracts import CONTRACTS, Contract, Found
from moe_trace.errors import NoRoutersFound, UsageError
from moe_trace.flops import expert_flops_per_slot, parameter_count, router_flops_per_token
from moe_trace.schema import RouterInfo

LayerSelector = Sequence[int | str] | Callable[["RouterSite"], bool] | None


@dataclass(frozen=True, kw_only=True)
class RouterSite:
    """One router, with the modules that hooks go on and the contract that reads its calls."""

    info: RouterInfo
    contract: Contract
    router: nn.Module
    experts: nn.Module | None
    block: nn.Module | None

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
    """The routers of `model` in the order of its modules.

    Args:
        layers: which of them: layer indices (`[0, 3]`), labels or module paths (`["L03"]`), or a
            predicate on the `RouterSite`. None takes all.

    Raises:
        NoRoutersFound: the model holds none that a known contract reads.
        UsageError: `layers` selects none of those found, or names one that does not exist.
    """
    found = list(_walk(model))
    if not found:
        raise NoRoutersFound(_no_routers_message(model))
    labels = _labels([path for path, _, _ in found])
    sites = [
        _site(path, label, contract, item)
        for (path, contract, item), label in zip(found, labels, strict=True)
    ]
    return _select(sites, layers)


def _walk(model: nn.Module) -> Iterable[tuple[str, Contract, Found]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        for contract in CONTRACTS:
            for item in contract.find(module):
                if id(item.router) not in seen:
                    seen.add(id(item.router))
                    yield f"{path}.{item.router_path}".lstrip("."), contract, item


def _site(path: str, label: tuple[str, int], contract: Contract, item: Found) -> RouterSite:
    site, layer = label
    info = RouterInfo(
        site=site,
        name=path,
        layer=layer,
        router_class=type(item.router).__name__,
        experts_class=type(item.experts).__name__ if item.experts is not None else None,
        contract=contract.name,
        num_experts=item.num_experts,
        top_k=item.top_k,
        router_flops_per_token=router_flops_per_token(item.router),
        expert_flops_per_slot=expert_flops_per_slot(item.experts) if item.experts is not None else 0,
        parameters={"router": parameter_count(item.router), "experts": parameter_count(item.experts)},
    )
    return RouterSite(
        info=info, contract=contract, router=item.router, experts=item.experts, block=item.block
    )


def _labels(paths: list[str]) -> list[tuple[str, int]]:
    """(label, layer) of each path: `L03`, or `L03.text` where a layer index holds several routers."""
    layers = [_layer_index(path, default=i) for i, path in enumerate(paths)]
    crowded = {layer for layer, count in Counter(layers).items() if count > 1}
    labels = []
    for path, layer in zip(paths, layers, strict=True):
        label = f"L{layer:02d}"
        if layer in crowded:
            peers = [p for p, other in zip(paths, layers, strict=True) if other == layer and p != path]
            label += f".{_distinguishing_part(path, peers)}"
        labels.append((label, layer))
    return labels


def _layer_index(path: str, default: int) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[0]) if numbers else default


def _distinguishing_part(path: str, peers: list[str]) -> str:
    """The shortest run of path components, from the first that differs, which no peer shares."""
    parts = path.split(".")
    others = [peer.split(".") for peer in peers]
    first = next((i for i in range(len(parts)) if any(parts[i : i + 1] != o[i : i + 1] for o in others)), 0)
    for end in range(first + 1, len(parts) + 1):
        if all(parts[first:end] != other[first:end] for other in others):
            return ".".join(part.removesuffix("_moe").removesuffix("_model") for part in parts[first:end])
    return path


def _select(sites: list[RouterSite], layers: LayerSelector) -> list[RouterSite]:
    if layers is None:
        return sites
    if callable(layers):
        chosen = [site for site in sites if layers(site)]
    else:
        wanted = set(layers)
        unknown = wanted - {key for site in sites for key in (site.layer, site.site, site.name)}
        if unknown:
            raise UsageError(
                f"layers= names {sorted(map(str, unknown))}, but the routers found are "
                f"{', '.join(f'{s.site} ({s.name})' for s in sites)}; give layer indices, labels or paths"
            )
        chosen = [site for site in sites if wanted & {site.layer, site.site, site.name}]
    if not chosen:
        raise UsageError(f"layers= selects none of the {len(sites)} routers found; pass None for all")
    return chosen


def _no_routers_message(model: nn.Module) -> str:
    known = "; ".join(f"{c.name}: {c.description}" for c in CONTRACTS)
    return (
        f"found 0 routers in {type(model).__name__}; known contracts: {known}. "
        "If it is a Mixture-of-Experts model, list what was looked at with `moe-trace routers MODEL`; "
        "if it is a dense model there is nothing to trace"
    )
