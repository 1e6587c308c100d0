"""Routes of random ids, for tests that need some."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_trace import RecordedRoutes


def random_routes(
    tokens: int, *, layers: int = 4, slots: int = 2, experts: int = 16, seed: int = 0, **columns: Any
) -> RecordedRoutes:
    """One sequence, with as many experts for each token and layer, all different."""
    rng = np.random.default_rng(seed)
    return RecordedRoutes(
        **{
            "expert_ids": rng.random((tokens, layers, experts)).argsort(2)[:, :, :slots].astype(np.uint8),
            "layers": tuple(f"layers.{i}.gate" for i in range(layers)),
            "num_experts": (experts,) * layers,
            "top_k": (slots,) * layers,
            "padding": np.zeros(tokens, bool),
            "step": np.zeros(tokens, np.int64),
            "forward": np.zeros(tokens, np.int64),
            "sequence": np.zeros(tokens, np.int32),
            "position": np.arange(tokens, dtype=np.int32),
            "stage_codes": np.zeros(tokens, np.uint8),
            **columns,
        }
    )
