"""Detection of experts that no contract names: shared experts, sibling experts, and unread experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from moe_trace.find.contracts.contract import Found
from moe_trace.find.contracts.modules import expert_matrices, expert_modules, unwrapped

_ABOVE_THE_BLOCK = ("shared_mlp", "shared_experts")
"""Names of shared experts that some families keep one level above the block."""
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)


def shared_modules(model: nn.Module, block_path: str, found: Found) -> tuple[nn.Module, ...]:
    """Return the modules that process every token: those the contract names, else those named `shared`."""
    if found.shared is not None:
        return found.shared
    children = model.get_submodule(block_path).named_children()
    inside = [
        child for name, child in children if "shared" in name and child not in (found.router, found.experts)
    ]
    if not block_path:
        return tuple(inside)
    above = dict(model.get_submodule(block_path.rpartition(".")[0]).named_children())
    return (*inside, *(above[name] for name in _ABOVE_THE_BLOCK if name in above))


def with_experts(found: Found) -> Found:
    """Add the weights of the experts next to the router to `found`, if its contract names none."""
    if found.experts is not None or found.weights is not None or found.block is None:
        return found
    experts = experts_beside(dict(found.block.named_children()), found.router, found.num_experts)
    return found if experts is None else replace(found, weights=(experts,))


def unread_experts(model: nn.Module, found: Sequence[Found]) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of the outermost modules that look like routed experts and no contract reads.

    These are modules named experts or MoE, by attribute or class, that hold 3-D weights [E, ., .] or a list
    of modules of the same class.
    """
    known = {id(part) for item in found for part in _parts(item)}
    unread: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other, _ in unread)
        if not inside and id(module) not in known and looks_like_experts(path, module):
            unread.append((path, module))
    return unread


def _parts(found: Found) -> Iterator[nn.Module]:
    for module in (found.block, found.experts, *(found.weights or ()), *(found.shared or ())):
        if module is not None:
            yield from module.modules()


def looks_like_experts(path: str, module: nn.Module) -> bool:
    """Return whether a module looks like routed experts, by both name and structure."""
    name = path.rpartition(".")[2]
    if not (_EXPERT_NAME.search(name) or _EXPERT_NAME.search(type(module).__name__)):
        return False
    return count_experts(module) > 1


def count_experts(module: nn.Module) -> int:
    """Return the number of experts: rows of own 3-D weights, or items of one class in a list; else 0."""
    rows = [p.shape[0] for name, p in expert_matrices(module) if "." not in name]
    children = expert_modules(module)
    same_class = len({type(child) for child in children}) == 1
    return max(rows, default=len(children) if same_class else 0)


def experts_beside(
    children: Mapping[str, nn.Module], router: nn.Module, num_experts: int
) -> nn.Module | None:
    """Return the only child of a block that is built of `num_experts` experts or, if that is 0, the only one
    that looks like experts by name; None if there is not exactly one."""
    others = {name: child for name, child in children.items() if child is not router}
    if num_experts:
        found = [child for child in others.values() if count_experts(unwrapped(child)) == num_experts > 1]
    else:
        found = [child for name, child in others.items() if looks_like_experts(name, unwrapped(child))]
    return found[0] if len(found) == 1 else None
