"""All that is written as JSON for people and tools: one form, one writer, without NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def json_text(value: Any) -> str:
    """The `plain` form, indented, with a line end."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """As JSON holds it: dataclasses as objects of their fields, arrays as lists.

    JSON knows no NaN and no infinity, which absurd times in a broken file can make: null.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def attributes(value: Any, *names: str) -> dict[str, Any]:
    """Some of an object's attributes, properties too, by name."""
    return {name: getattr(value, name) for name in names}
