"""How a record shows itself in a notebook without importing what draws it.

Records stand below the renderers. `moe_trace/__init__.py`, which knows both, says which renderer draws which
record; it is imported when a notebook first asks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

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
