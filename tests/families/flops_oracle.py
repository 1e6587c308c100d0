"""Count FLOPs of routers, experts and dense work in the block by torch, not by a formula."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .family import use_experts
from .sites import Call, Capture, Site, find_sites

BESIDE_THE_BLOCK = ("shared_mlp", "shared_experts")
"""Names of always active modules that some families keep one level above the block of experts."""


@dataclasses.dataclass(frozen=True)
class CallFlops:
    """FLOPs of one call of one layer's experts."""

    path: str
    router_path: str
    call: int
    router: int
    experts: int
    dense: dict[str, int]
    """Path -> FLOPs of what works on every token: shared experts, their gates, projections round experts."""


@torch.no_grad()
def count_flops(model: nn.Module, run: Callable[[], Any]) -> list[CallFlops]:
    """FLOPs of every call of experts while ``run()`` calls the model, in the order of the calls.

    The experts compute eagerly from then on: torch has no formula for grouped matrix products.
    """
    use_experts(model, "eager")
    sites = {site.path: site for site in find_sites(model)}
    modules = _modules_to_count(model, list(sites.values()))
    with Capture(modules) as capture:
        run()
    with _frozen(model):
        flops = {(call.path, call.number): _flops_of(modules[call.path], call) for call in capture.calls}
    return [
        _of_site(model, sites[call.path], call.number, flops) for call in capture.calls if call.path in sites
    ]


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The counter follows modules by autograd hooks, which views of weights break under no_grad (dbrx)."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _of_site(model: nn.Module, site: Site, number: int, flops: dict[tuple[str, int], int]) -> CallFlops:
    own = {path: flops.get((path, number), 0) for path in _parts(site)}
    dense = {path: flops.get((path, number), 0) for path in _dense_beside(model, site)}
    router = flops.get((site.router_path, number), 0)
    experts = sum(own.values())
    if site.kind == "DogeCDMoE":
        # Experts are matrix products of the block itself: what is left when its layers are taken off.
        router = flops[f"{site.path}.router_gate", number]
        experts = flops[site.path, number] - router - sum(dense.values())
    return CallFlops(
        path=site.path,
        router_path=site.router_path,
        call=number,
        router=router,
        experts=experts,
        dense={path: count for path, count in dense.items() if count},
    )


def _modules_to_count(model: nn.Module, sites: list[Site]) -> dict[str, nn.Module]:
    paths: set[str] = set()
    for site in sites:
        paths |= {site.path, *_parts(site), *_dense_beside(model, site)}
        paths |= {site.router_path} - {""}
        if site.kind == "DogeCDMoE":
            paths.add(f"{site.path}.router_gate")
    modules = {path: model.get_submodule(path) for path in sorted(paths)}
    return modules | {site.path: site.captured for site in sites}


def _parts(site: Site) -> list[str]:
    """The modules that compute a site's experts."""
    if site.kind.startswith("JetMoe"):
        return [f"{site.path}.input_linear", f"{site.path}.output_linear"]
    return [site.path]


def _dense_beside(model: nn.Module, site: Site) -> list[str]:
    """Paths of what every token passes through, beside the experts."""
    if site.kind == "DogeCDMoE":
        return [f"{site.path}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    if site.kind.startswith("JetMoe"):
        return []
    block_path = site.path.rpartition(".")[0]
    names = [name for name, _ in model.get_submodule(block_path).named_children()]
    if any("attn" in name for name in names):
        # No block of experts: they lie in the decoder layer itself, next to its dense network.
        return [f"{block_path}.mlp"]
    beside = [f"{block_path}.{name}" for name in names]
    layer_path = block_path.rpartition(".")[0]
    layer = model.get_submodule(layer_path)
    above = [f"{layer_path}.{name}" for name in BESIDE_THE_BLOCK if hasattr(layer, name)]
    return [path for path in beside + above if path not in (site.path, site.router_path)]


def _flops_of(module: nn.Module, call: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        module.forward(*call.args, **call.kwargs)
    return counter.get_total_flops()
