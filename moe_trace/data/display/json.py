"""JSON output for people and tools, without NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def json_text(value: Any) -> str:
    """Return the `plain` form as indented JSON, ending with a newline."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Convert to plain JSON types: dataclasses to objects of their fields, arrays to lists.

    NaN and infinity, which invalid times in a damaged file can produce, become null.
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
    """Return the named attributes of an object, properties included."""
    return {name: getattr(value, name) for name in names}
