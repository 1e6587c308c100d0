"""Validated settings of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_trace.data.errors import UsageError
from moe_trace.data.routes.options import Routes
from moe_trace.data.routes.reader import SUFFIX

Mode = Literal["prefill", "generate", "train"]
DTYPES = ("float32", "bfloat16", "float16")


EP_IMPLEMENTATIONS = ("auto", "all_to_all", "all_reduce")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Number of processes of a run, and how they split it."""

    fsdp: int = 1
    """Number of processes with tokens of their own that shard the weights (FSDP 2)."""
    tp: int = 1
    """Number of processes that split matrices and work on the same tokens."""
    ep: int = 1
    """Number of processes that divide the experts, out of those counted by `fsdp` x `tp`."""
    ep_implementation: str = "auto"
    ddp: bool = False
    """Whether every process has the whole model, and tokens of its own."""

    def __post_init__(self) -> None:
        for name in ("fsdp", "tp", "ep"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1")
        if self.ddp and self.needs_transformers:
            raise UsageError("give --ddp, or --fsdp, --tp and --ep, not both")
        if self.ep_implementation not in EP_IMPLEMENTATIONS:
            raise UsageError(f"--ep-implementation: expected one of {', '.join(EP_IMPLEMENTATIONS)}")
        if self.fsdp * self.tp % self.ep or (self.ep % self.tp and self.ep > 1):
            raise UsageError(
                f"--ep {self.ep} must divide --fsdp x --tp ({self.fsdp} x {self.tp}) and be a multiple of "
                f"--tp: experts are dealt out to those same processes. Try --fsdp {self.ep} --ep {self.ep}"
            )
        if self.ep_implementation == "all_reduce" and self.ep not in (1, self.tp):
            raise UsageError(
                "--ep-implementation all_reduce needs all processes that share experts to have the same "
                f"tokens: --tp {self.ep} --ep {self.ep}"
            )

    @property
    def needs_transformers(self) -> bool:
        """Whether transformers splits the model."""
        return self.fsdp * self.tp * self.ep > 1

    @property
    def is_split(self) -> bool:
        """Whether there is more than one process."""
        return self.ddp or self.needs_transformers

    @property
    def processes(self) -> int | None:
        """Number of processes needed; None if any number will do."""
        return None if self.ddp else self.fsdp * self.tp


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one `moe-trace run`."""

    model: str = "demo"
    """`demo`, a hub id, a folder, or a config.json."""
    random_weights: bool = False
    prompt: str | None = None
    prompts_file: Path | None = None
    mode: Mode = "prefill"
    steps: int = 4
    """Number of recorded steps."""
    warmup: int = 1
    """Number of steps run before, which are not recorded."""
    batch: int | None = None
    """Sequences per step; by default one per prompt, at least 1."""
    seq_len: int | None = None
    """Tokens per sequence; by default those of the longest prompt."""
    max_new_tokens: int = 16
    device: str = "auto"
    top_k: int | None = None
    """Experts per token; by default as in the model's config."""
    experts_implementation: str | None = None
    """Experts implementation in transformers: eager, grouped_mm, batched_mm; by default the model's own."""
    dtype: str | None = None
    """By default float32 on a CPU and bfloat16 on a GPU, except for the demo, which is always float32."""
    layers: tuple[int | str, ...] | None = None
    every: int = 1
    routes: bool | Path = False
    """Whether to record which token went to which expert: next to each trace, or in this file."""
    record_shapes: bool = False
    with_stack: bool = False
    out: Path = Path("moe_trace_runs")
    force: bool = False
    seed: int = 0
    split: Split = field(default_factory=Split)
    rank_timeout: float = 120.0
    """Time in seconds that rank 0 waits for the others' traces."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("every", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
        for name in ("batch", "seq_len", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
        if self.rank_timeout <= 0:
            raise UsageError("--rank-timeout must be above 0")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        if self.prompt is not None and self.prompts_file is not None:
            raise UsageError("give --prompt or --prompts-file, not both")


def routes_of(config: RunConfig) -> bool | Routes:
    """Return the routes option of this process; each of several processes has its own file."""
    if isinstance(config.routes, bool):
        return config.routes
    path, rank = config.routes, os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        path = path.with_name(f"{path.name.removesuffix(SUFFIX).removesuffix('.npz')}.rank{rank}{SUFFIX}")
    return Routes(path=path.absolute())  # a program may change its directory


def routes_elsewhere(config: RunConfig, files: Iterable[Path]) -> list[Path]:
    """Return the explicitly named file of routes if it is not among `files`."""
    routes = routes_of(config)
    path = Path(routes.path) if isinstance(routes, Routes) and routes.path is not None else None
    return [] if path is None or path in {file.absolute() for file in files} else [path]
