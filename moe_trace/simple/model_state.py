"""Restore a model exactly, whatever a function did to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class ModelState:
    """Snapshot of a model: modules, hooks, attributes, configs, and the values of its tensors.

    Restored are: replaced, added and removed submodules, parameters and buffers; all hooks; all plain
    attributes of a module (`training`, `top_k`, a patched `forward`); its class; config objects; and the bits
    of all parameters and buffers, their dtype, device, `requires_grad` and `.grad`. The copy of the values
    takes as much host memory as the model's weights.

    Not restored: state outside the model, such as an optimizer's or a random generator's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._objects = [_ObjectState(module, copy.copy) for module in model.modules()]
        self._objects += [_ObjectState(config, copy.deepcopy) for config in _configs(model)]
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [_TensorState(tensor) for tensor in {id(t): t for t in tensors}.values()]

    def restore(self) -> None:
        """Restore everything. May be called repeatedly."""
        for known in self._objects:
            known.restore()
        for tensor in self._tensors:
            tensor.restore()


class _ObjectState:
    """An object's class and attributes. Containers among these keep their identity and regain their content.

    Identity matters: a hook's handle refers to its dict by a weak reference.

    Args:
        copied: function that copies a container: shallow for a module's, deep for a config's.
    """

    def __init__(self, target: Any, copied: Callable[[Any], Any]) -> None:
        self._target, self._class, self._copied = target, type(target), copied
        self._attributes = dict(vars(target))
        self._contents = {
            name: copied(value)
            for name, value in self._attributes.items()
            if isinstance(value, dict) or type(value) in (list, set)
        }

    def restore(self) -> None:
        if type(self._target) is not self._class:
            self._target.__class__ = self._class
        attributes = vars(self._target)
        attributes.clear()
        attributes.update(self._attributes)
        for name, content in self._contents.items():
            container: Any = self._attributes[name]
            container.clear()
            if isinstance(container, list):
                container.extend(self._copied(content))
            else:
                container.update(self._copied(content))


class _TensorState:
    """The original storage of a parameter or buffer, and a copy of its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.data
        self._values = tensor.detach().to("cpu", copy=True) if tensor.device.type != "meta" else None
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._grad_data = None if self._grad is None else self._grad.data
        self._grad_values = None if self._grad is None else self._grad.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        self._tensor.data = self._data
        if self._values is not None:
            self._data.copy_(self._values)
        if self._tensor.is_leaf:
            self._tensor.requires_grad_(self._requires_grad)
            if self._grad is not None and self._grad_data is not None and self._grad_values is not None:
                self._grad.data = self._grad_data
                self._grad.copy_(self._grad_values)
            self._tensor.grad = self._grad


def _configs(model: nn.Module) -> list[Any]:
    """Return all config objects of the model, including those nested in other configs."""
    found: dict[int, Any] = {}
    queue = [value for module in model.modules() for value in vars(module).values() if _is_config(value)]
    while queue:
        config = queue.pop()
        if id(config) not in found:
            found[id(config)] = config
            queue.extend(value for value in vars(config).values() if _is_config(value))
    return list(found.values())


def _is_config(value: Any) -> bool:
    if isinstance(value, nn.Module | Tensor | type) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, SimpleNamespace) or hasattr(value, "to_dict")
