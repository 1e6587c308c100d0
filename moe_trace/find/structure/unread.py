"""Say of modules that look like a mixture of experts why they were not taken for one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moe_trace.find.contracts.modules import class_name, forward_parameters, unwrapped
from moe_trace.find.structure.router_beside_experts import why_not_taken


def describe_unread(model: nn.Module, unread: Sequence[tuple[str, nn.Module]]) -> str:
    """The first few of them: the block with what it lacks, else how its experts are called.

    Args:
        unread: (path, module) of what looks like routed experts.
    """
    shown = dict.fromkeys(_described(model, path, module) for path, module in unread)
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return "; ".join(list(shown)[:3]) + more


def _described(model: nn.Module, path: str, module: nn.Module) -> str:
    above = path.rpartition(".")[0]
    block = model.get_submodule(above)
    why = why_not_taken(block) if path else None
    if why is not None:
        return f"{above or 'the model'} ({class_name(unwrapped(block))}): {why}"
    called = ", ".join(forward_parameters(unwrapped(module)))
    return f"{path or 'the model'} ({class_name(unwrapped(module))}, called as ({called}))"
