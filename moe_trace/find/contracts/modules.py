"""Inspection of modules and values without running them: signatures, wrappers, sizes and shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts.contract import AdapterMismatch

# Attributes in which wrappers keep the wrapped module: PEFT, FSDP 1, DataParallel and DDP, torch.compile,
# activation checkpointing.
_WRAPPED = (
    "base_layer",
    "original_module",
    "_fsdp_wrapped_module",
    "module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
)
# Matches the code of a router that returns the result of a softmax first, or only weights and index.
_NO_LOGITS = re.compile(r"\b(\w+) = [\w.]*softmax\(.*\breturn \1,|\breturn \w+, \w+\s*$", re.DOTALL)
_ANY_ARGUMENTS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers that pass their arguments on, or the module itself."""
    while any(p.kind in _ANY_ARGUMENTS for p in _parameters(module)):
        inner = [child for name in _WRAPPED if (child := module._modules.get(name)) is not None]
        if not inner:
            return module
        module = inner[0]
    return module


def class_name(module: nn.Module) -> str:
    """Return the name of the module's original class, in front of which FSDP 2 puts its own class."""
    if hasattr(module, "_get_fsdp_state"):
        return type(module).__mro__[2].__name__
    return type(module).__name__


def forward_parameters(module: nn.Module) -> list[str]:
    """Return the parameter names of the class's forward after self; empty if they cannot be determined.

    The class is inspected because expert parallelism replaces the instance's `forward` by a wrapper.
    """
    return [parameter.name for parameter in _parameters(module)]


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []


def returns_logits(router: nn.Module) -> bool:
    """Return whether a router returns logits first; True unless its code shows otherwise.

    This depends on the version of the router's code, and cannot be seen in the values, since probabilities
    could be logits too.
    """
    try:
        return not _NO_LOGITS.search(inspect.getsource(type(router).forward))
    except (OSError, TypeError):
        return True


def logits_module(router: nn.Module, experts: int) -> tuple[str, nn.Module] | None:
    """Return (name, module) of the only linear layer inside a router with one output per expert, or None."""
    linear = [
        (name, child)
        for name, child in router.named_children()
        if getattr(unwrapped(child), "out_features", None) == experts
    ]
    return linear[0] if len(linear) == 1 else None


def int_attribute(module: Any, *names: str) -> int:
    """Return the first of these attributes that is a positive integer, or 0."""
    for name in names:
        value = getattr(module, name, 0)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def expert_matrices(experts: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, weight) of the 3-D weights [E, ., .] of a module, without scales of quantized ones."""
    for name, parameter in experts.named_parameters():
        if parameter.dim() == 3 and "scale" not in name.rsplit(".", 1)[-1]:
            yield name, parameter


def expert_rows(experts: nn.Module) -> list[int]:
    """Return the sorted distinct first dimensions of the 3-D weights, which are numbers of experts."""
    return sorted({parameter.shape[0] for _, parameter in expert_matrices(experts)})


def expert_modules(experts: nn.Module) -> list[nn.Module]:
    """Return the children that are one expert each, if the experts are a list or dict of modules."""
    if not isinstance(experts, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return []
    return [child for child in experts.children() if any(True for _ in child.parameters())]


def require_2d(what: str, value: Any, *, integer: bool = False) -> None:
    """Raise `AdapterMismatch` unless `value` is a 2-D tensor, of integers or of floats."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise AdapterMismatch(f"expected {what} to be a 2-D tensor, found {described(value)}")
    if value.is_floating_point() is integer:
        kind = "integers" if integer else "floating-point numbers"
        raise AdapterMismatch(f"expected {what} to be {kind}, found {described(value)}")


def described(value: Any) -> str:
    """Return a value's type and shape in words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} ({', '.join(described(item) for item in value)})"
    return f"{type(value).__name__}"
