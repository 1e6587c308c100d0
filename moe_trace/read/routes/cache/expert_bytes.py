"""How large one expert's weights are, where the model's recorded config tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def expert_bytes(model: Mapping[str, Any]) -> int | None:
    """Bytes of an expert of gate, up and down projection: 3 * hidden * intermediate * bytes of a number.

    Biases are left out. None where the sizes or the type are not recorded, or the weights are quantised.

    Args:
        model: `RecordedRoutes.model`, with `dtype` and the `config` of transformers.
    """
    config = model.get("config")
    if not isinstance(config, Mapping) or any(str(key).startswith("quantization") for key in config):
        return None
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    sizes = config.get("hidden_size"), inner, _BYTES.get(str(model.get("dtype")))
    if not all(isinstance(size, int) and 0 < size < 1 << 31 for size in sizes):
        return None
    hidden, intermediate, number = sizes
    return 3 * int(hidden or 0) * int(intermediate or 0) * int(number or 0)
