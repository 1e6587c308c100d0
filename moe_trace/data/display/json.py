"""All that is written as JSON for people and tools: one writer, without NaN or infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """Indented, with a line end."""
    return json.dumps(without_nonfinite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def without_nonfinite(value: Any) -> Any:
    """JSON knows no NaN and no infinity; absurd times in a broken file can make them: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(inner) for inner in value]
    return value
