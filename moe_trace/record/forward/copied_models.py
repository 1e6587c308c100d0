"""What hooks become in a copy or a pickle of a traced model: it is another model, which is not recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moe_trace.find.private.torch_names import remove_hooks, shares_hooks


class InertHooks:
    """Stands in a saved model for the hooks that were on; every hook of it does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing


def _nothing(*_: Any, **__: Any) -> None: ...


class HookOwner:
    """For classes whose methods `before...` and `after...` are put on modules as hooks.

    `copy.deepcopy` of a module copies its hooks: they stay bound to the same object, which finds with
    `detach_if_copy` that they were called for another module, and takes them off it. A pickle gets hooks
    that do nothing.
    """

    @classmethod
    def hooks(cls) -> list[Callable[..., Any]]:
        """Its methods that are put on modules."""
        named = ("before", "after")
        return [method for name, method in vars(cls).items() if name.lstrip("_").startswith(named)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        return InertHooks, ()


def detach_if_copy(module: nn.Module, original: nn.Module | None) -> bool:
    """Whether a hook was called for a copy of the module that it was put on.

    Replicas are none, nor are shallow copies: what is below them, and their hooks, are the original's own.
    If so, all such hooks are taken off the copy and what is below it.
    """
    if module is original or getattr(module, "_is_replica", False):
        return False
    if original is not None and shares_hooks(module, original):
        return False
    for part in module.modules():
        remove_hooks(part, lambda hook: isinstance(getattr(hook, "__self__", None), HookOwner))
    return True
