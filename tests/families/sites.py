"""Find the experts of a model without knowledge of what their router returns.

The oracles only capture the inputs of these modules in a forward. They find the true routing by running the
experts again.
"""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

INDEX_PARAMETERS = frozenset({"top_k_index", "router_indices", "selected_experts", "router_mask"})
"""Names of the second parameter by which the forward of an experts module is told."""
ODD_EXPERTS = frozenset({"Llama4TextExperts", "DogeCDMoE", "JetMoeMoE", "JetMoeMoA", "VitPoseNaiveMoe"})
"""Classes that hold experts and do not follow that convention."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One module that holds experts."""

    path: str
    module: nn.Module
    router_path: str
    """Path of the router; that of the module itself where it routes inside, empty where nothing routes."""

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def captured(self) -> nn.Module:
        """The module whose call shows the input of the experts."""
        return self.module.get_submodule("router") if self.kind == "JetMoeMoA" else self.module

    @property
    def real_experts(self) -> int:
        """Experts with weights of their own; identity experts are not among them."""
        return len(expert_weights(self.module))


@dataclasses.dataclass(frozen=True)
class Call:
    """What one module was given in one call."""

    path: str
    number: int
    """0, 1, 2 … for each module."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_sites(model: nn.Module) -> list[Site]:
    """Every module with experts, in the order of ``named_modules``."""
    return [
        Site(path, module, _router_path(model, path))
        for path, module in model.named_modules()
        if _holds(module)
    ]


def expert_weights(module: nn.Module) -> list[list[torch.Tensor]]:
    """For every real expert the views of all its weights: writing to them changes the module."""
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        own = [[weight.data for weight in child.parameters()] for child in module.children()]
        return [weights for weights in own if weights]
    if type(module).__name__ == "DogeCDMoE":
        tables = [module.get_parameter(f"{name}.weight").data for name in ("up_embed", "down_embed")]
    elif type(module).__name__ == "DbrxExperts":
        count = _size(module, "num_experts")
        tables = [weight.data.view(count, -1, weight.shape[-1]) for weight in module.parameters()]
    else:
        tables = [weight.data for weight in module.parameters() if weight.ndim == 3]
    experts = min(table.shape[0] for table in tables)
    return [[table[expert] for table in tables] for expert in range(experts)]


class Capture:
    """Keeps the inputs of some modules while it is open."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.calls: list[Call] = []
        self._modules = modules
        self._counts: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Capture":
        for path, module in self._modules.items():
            hook = self._keeper(path)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keeper(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            copies = {name: _copy(value) for name, value in kwargs.items()}
            self.calls.append(Call(path, self._counts[path], tuple(_copy(arg) for arg in args), copies))
            self._counts[path] += 1

        return keep


def _copy(value: Any) -> Any:
    """Some models change their tensors in place after the call."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _size(module: Any, attribute: str) -> int:
    return int(getattr(module, attribute))


def _holds(module: nn.Module) -> bool:
    if type(module).__name__ in ODD_EXPERTS:
        return True
    parameters = list(inspect.signature(type(module).forward).parameters)
    return len(parameters) >= 4 and parameters[2] in INDEX_PARAMETERS


def _router_path(model: nn.Module, path: str) -> str:
    module = model.get_submodule(path)
    if type(module).__name__ == "DogeCDMoE":
        return path
    inside = type(module).__name__.startswith("JetMoe")
    block_path = path if inside else path.rpartition(".")[0]
    block = model.get_submodule(block_path)
    names = [name for name, _ in block.named_children() if name in ("gate", "router")]
    return f"{block_path}.{names[0]}" if names else ""
