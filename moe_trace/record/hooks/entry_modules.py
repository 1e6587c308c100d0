"""Modules through which a model is entered: the model itself, what it wraps, and models inside it.

`PeftModel.generate`, `ddp.module.generate` and `model.model(...)` never call the traced object, so each
module with which a forward may begin is hooked; the outermost one that is called is the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from moe_trace.data.schema import STAGES
from moe_trace.find.private.torch_names import count_function_modes, outside_functions
from moe_trace.find.routers import RouterSite
from moe_trace.record.forward.copied_models import HookOwner, detach_if_copy
from moe_trace.record.forward.inputs import ModelInputs
from moe_trace.record.forward.isolation import Failures
from moe_trace.record.graphs.compiled import give_stable_id
from moe_trace.record.graphs.compiled_rings import ModelRings


class Watch(Protocol):
    """Receiver of the calls of entry modules."""

    failures: Failures

    def begin(self, entry: ModelEntry, args: Any, kwargs: dict[str, Any], replica: bool) -> None:
        """Handle a call of the module, or of a replica of it."""

    def end(self, entry: ModelEntry, output: Any) -> None:
        """Handle its return; `output` is None if it raised."""


class ModelEntry(HookOwner):
    """A module with which a forward may begin.

    Args:
        level: number of modules around it; smaller is further outside.
        rings: notified of forwards inside a graph that is being compiled, which contains nothing else of its
            tracer.
    """

    def __init__(self, module: nn.Module, level: int, watch: Watch, rings: ModelRings) -> None:
        self.module, self.level, self._watch, self._rings = module, level, watch, rings
        self.inputs = ModelInputs(module)
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        self.inputs = ModelInputs(self.module)  # its forward may have been wrapped meanwhile
        self._handles = [
            self.module.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True),
            self.module.register_forward_hook(self.after, always_call=True),
        ]
        for handle in self._handles:
            give_stable_id(handle)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        """Forward pre-hook."""
        kwargs, replica = kwargs or {}, module is not self.module
        if replica and detach_if_copy(module, self.module):
            return
        if is_compiling():
            self._rings.start_in_graph(STAGES.index(self.inputs.stage(args, kwargs)), self.level)
            return
        try:
            if count_function_modes():
                with outside_functions():
                    self._watch.begin(self, args, kwargs, replica)
            else:
                self._watch.begin(self, args, kwargs, replica)
        except Exception as error:
            self._watch.failures.note(error)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        if module is not self.module and detach_if_copy(module, self.module):
            return
        if is_compiling():
            self._rings.end_in_graph(self.level)
            return
        try:
            if count_function_modes():
                with outside_functions():
                    self._watch.end(self, output)
            else:
                self._watch.end(self, output)
        except Exception as error:
            self._watch.failures.note(error)


def entry_modules(model: nn.Module, sites: Sequence[RouterSite]) -> list[tuple[nn.Module, int]]:
    """Return (module, level), outermost first: all modules above the layers through which all routers are
    reached, and all language models inside a model that holds several."""
    parts = {id(part) for site in sites for part in (site.router, site.experts, site.block)}
    found: dict[int, tuple[nn.Module, int]] = {id(model): (model, 0)}
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for site in sites:
        module, below = model, site.name.split(".")
        for level, name in enumerate(below[:-1], start=1):
            module = module.get_submodule(name)
            if id(module) in parts or isinstance(module, nn.ModuleList | nn.ModuleDict):
                break
            path = ".".join(below[:level]) + "."
            holds_all = all(other.name.startswith(path) for other in sites)
            if holds_all or (not encoder_decoder and ModelInputs(module).names_tokens):
                found.setdefault(id(module), (module, level))
    return sorted(found.values(), key=lambda item: item[1])
