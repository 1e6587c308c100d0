"""Hand-made routes whose experts are known by a formula: expert = (id + 3 layer + 5 slot) mod E."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_trace import RecordedRoutes

LAYERS, SLOTS, EXPERTS = 3, 2, 8
BYTE_OFFSET = 3  # ids of the demo model's tokenizer, byt5()


def expert(token_id: int, layer: int, slot: int) -> int:
    return (token_id + 3 * layer + 5 * slot) % EXPERTS


def weight(slot: int) -> float:
    return (0.625, 0.25)[slot]


def make_routes(texts: list[str], *, text: bool = True, **changes: Any) -> RecordedRoutes:
    """A batch with a sequence a text, a token a byte, padded on the left; slots of id 0 go nowhere."""
    encoded = [np.frombuffer(one.encode(), np.uint8).astype(np.int32) + BYTE_OFFSET for one in texts]
    longest = max(map(len, encoded))
    ids_BS = np.array([np.pad(one, (longest - len(one), 0)) for one in encoded])
    position_BS = np.array([np.arange(longest) - (longest - len(one)) for one in encoded])
    ids_T = ids_BS.ravel()
    tokens = len(ids_T)
    grid = expert(ids_T[:, None, None], np.arange(LAYERS)[:, None], np.arange(SLOTS))
    columns: dict[str, Any] = {
        "expert_ids": grid.astype(np.uint8),
        "layers": tuple(f"model.layers.{i}.mlp.gate" for i in range(LAYERS)),
        "num_experts": (EXPERTS,) * LAYERS,
        "top_k": (SLOTS,) * LAYERS,
        "padding": ids_T == 0,
        "step": np.zeros(tokens, np.int64),
        "forward": np.zeros(tokens, np.int64),
        "sequence": np.repeat(np.arange(len(texts), dtype=np.int32), longest),
        "position": np.maximum(position_BS.ravel(), -1).astype(np.int32),
        "stage_codes": np.zeros(tokens, np.uint8),
        "weights": np.broadcast_to(np.array([weight(0), weight(1)], np.float16), grid.shape).copy(),
        "token_ids": ids_T if text else None,
        "model": {"name": "made by hand"},
    }
    return RecordedRoutes(**{**columns, **changes})
