"""How a record shows itself in a notebook and in a shell, without importing what draws it.

Records stand below the renderers. `moe_trace/__init__.py`, which knows both, says which renderer draws which
record; it is imported when a notebook first asks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sized
from dataclasses import fields
from typing import Any

_RENDERERS: dict[str, str] = {}


def register_renderers(renderers: Mapping[str, str]) -> None:
    """Tell who draws what: `module.Class` of a record -> `module.function`, which returns HTML."""
    _RENDERERS.update(renderers)


class ShownInNotebooks:
    """A record, or a subclass of one, that a registered renderer draws."""

    def _repr_html_(self) -> str | None:
        for kind in type(self).__mro__:
            renderer = _RENDERERS.get(f"{kind.__module__}.{kind.__qualname__}")
            if renderer is not None:
                module, _, function = renderer.rpartition(".")
                return getattr(importlib.import_module(module), function)(self)
        return None  # notebooks fall back to the repr


class ShortRepr:
    """A dataclass (`repr=False`) whose repr has its numbers and words, and of the rest how much there is."""

    def __repr__(self) -> str:
        shown = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:59]}…")
    return f"<{len(value)}>" if isinstance(value, Sized) else f"<{type(value).__name__}>"
