"""Detach hooks from copies and pickles of a traced model, which are separate models and not recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moe_trace.find.private.torch_names import remove_hooks, shares_hooks


class InertHooks:
    """Replacement for the hooks in a pickled model; each of its hooks does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _no_op


def _no_op(*_: Any, **__: Any) -> None: ...


class HookOwner:
    """Base class for classes whose `before...` and `after...` methods are registered on modules as hooks.

    `copy.deepcopy` of a module copies its hooks, which stay bound to the same object. With `detach_if_copy`,
    that object detects a call for another module and removes the hooks from it. A pickle gets hooks that do
    nothing.
    """

    @classmethod
    def hooks(cls) -> list[Callable[..., Any]]:
        """Return the methods that are registered on modules."""
        named = ("before", "after")
        return [method for name, method in vars(cls).items() if name.lstrip("_").startswith(named)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        return InertHooks, ()


def detach_if_copy(module: nn.Module, original: nn.Module | None) -> bool:
    """Return whether a hook was called for a copy of the module on which it was registered.

    If so, remove all such hooks from the copy and its submodules. Replicas do not count as copies, nor do
    shallow copies, which share their submodules and hooks with the original.
    """
    if module is original or getattr(module, "_is_replica", False):
        return False
    if original is not None and shares_hooks(module, original):
        return False
    for part in module.modules():
        remove_hooks(part, lambda hook: isinstance(getattr(hook, "__self__", None), HookOwner))
    return True
