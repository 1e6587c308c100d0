"""Read the results of a start of vLLM's engine, for the tests in `vllm_engine/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_trace

PROMPT_TOKENS = 40 + 25 + 31 + 17
ROUTERS = [f"model.layers.{layer}.mlp.gate" for layer in range(4)]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class EngineRun:
    """What one start of the engine left."""

    result: dict[str, Any]
    traces: list[Path]
    """In the order in which they were written."""
    said: str

    @property
    def tokens(self) -> list[list[list[int]]]:
        """Of each request, by phase."""
        return [phase["tokens"] for phase in self.result["phases"]]


Runner = Callable[..., EngineRun]


def counts_in(trace: Path) -> dict[str, list[list[int]]]:
    """By router, the tokens per expert of each call, in the order of the calls."""
    found: dict[str, list[list[int]]] = {}
    for sample in moe_trace.read_recording(trace).samples:
        found.setdefault(sample.name, []).append(sample.assignments.tolist())
    return found
