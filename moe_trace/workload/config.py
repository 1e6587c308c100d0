"""The settings of a run, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_trace.errors import UsageError

Mode = Literal["prefill", "generate", "train"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One `moe-trace run`."""

    model: str = "demo"
    """`demo`, a hub id, a folder, or a config.json."""
    random_weights: bool = False
    prompt: str | None = None
    prompts_file: Path | None = None
    mode: Mode = "prefill"
    steps: int = 4
    """Recorded steps."""
    warmup: int = 1
    """Steps run before, which are not recorded."""
    batch: int | None = None
    """Sequences per step; by default one per prompt, at least 1."""
    seq_len: int | None = None
    """Tokens per sequence; by default the longest prompt's."""
    max_new_tokens: int = 16
    device: str = "auto"
    dtype: str | None = None
    """By default float32 on a CPU and bfloat16 on a GPU; the demo's own type stays."""
    layers: tuple[int | str, ...] | None = None
    every: int = 1
    record_shapes: bool = False
    with_stack: bool = False
    out: Path = Path("moe_trace_runs")
    force: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("every", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
        for name in ("batch", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        if self.prompt is not None and self.prompts_file is not None:
            raise UsageError("give --prompt or --prompts-file, not both")
