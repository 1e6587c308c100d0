"""Display of records in notebooks and shells, without importing the renderers.

Records are imported by renderers, not the reverse. `moe_trace/__init__.py`, which knows both, registers a
renderer for each record; it is imported when a notebook first displays one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sized
from typing import Any

_RENDERERS: dict[str, str] = {}


def register_renderers(renderers: Mapping[str, str]) -> None:
    """Register renderers: `module.Class` of a record -> `module.function`, which returns HTML."""
    _RENDERERS.update(renderers)


class ShownInNotebooks:
    """Base class of records displayed by the renderer of their class or a base class."""

    def _repr_html_(self) -> str | None:
        for kind in type(self).__mro__:
            renderer = _RENDERERS.get(f"{kind.__module__}.{kind.__qualname__}")
            if renderer is not None:
                module, _, function = renderer.rpartition(".")
                return getattr(importlib.import_module(module), function)(self)
        return None  # notebooks fall back to the repr


class ShortRepr:
    """Base class of dataclasses (`repr=False`) whose repr shows numbers, text, and the size of all else."""

    def __repr__(self) -> str:
        # Imported late: it takes as long as the rest of `import moe_trace`, which needs no dataclass.
        from dataclasses import fields

        shown = (f"{field.name}={_short_repr(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _short_repr(value: Any) -> str:
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:59]}…")
    return f"<{len(value)}>" if isinstance(value, Sized) else f"<{type(value).__name__}>"
