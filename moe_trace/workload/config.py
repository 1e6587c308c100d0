"""The settings of a run, checked once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_trace.data.errors import UsageError
from moe_trace.data.routes.file import SUFFIX
from moe_trace.data.routes.options import Routes

Mode = Literal["prefill", "generate", "train"]
DTYPES = ("float32", "bfloat16", "float16")


EP_IMPLEMENTATIONS = ("auto", "all_to_all", "all_reduce")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Over how many processes a run is split, and by what."""

    fsdp: int = 1
    """Processes with tokens of their own, which share the weights (FSDP 2)."""
    tp: int = 1
    """Processes that split the matrices and work on the same tokens."""
    ep: int = 1
    """Processes that deal out the experts; the same ones that `fsdp` x `tp` counts."""
    ep_implementation: str = "auto"
    ddp: bool = False
    """Every process has the whole model, and tokens of its own."""

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
        """Whether transformers does the splitting."""
        return self.fsdp * self.tp * self.ep > 1

    @property
    def is_split(self) -> bool:
        """Whether there is more than one process."""
        return self.ddp or self.needs_transformers

    @property
    def processes(self) -> int | None:
        """How many are needed; None where any number will do."""
        return None if self.ddp else self.fsdp * self.tp


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
    top_k: int | None = None
    """Experts a token; by default as the model's config says."""
    experts_implementation: str | None = None
    """How transformers computes the experts: eager, grouped_mm, batched_mm; by default as the model does."""
    dtype: str | None = None
    """By default float32 on a CPU and bfloat16 on a GPU; the demo's own type stays."""
    layers: tuple[int | str, ...] | None = None
    every: int = 1
    routes: bool | Path = False
    """Whether to record which token went to which expert: beside each trace, or in this file."""
    record_shapes: bool = False
    with_stack: bool = False
    out: Path = Path("moe_trace_runs")
    force: bool = False
    seed: int = 0
    split: Split = field(default_factory=Split)
    rank_timeout: float = 120.0
    """Seconds that rank 0 waits for the others' traces."""

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
    """Which routes this process records; each of several has a file of its own."""
    if isinstance(config.routes, bool):
        return config.routes
    path, rank = config.routes, os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        path = path.with_name(f"{path.name.removesuffix(SUFFIX).removesuffix('.npz')}.rank{rank}{SUFFIX}")
    return Routes(path=path.absolute())  # a program may go elsewhere


def routes_elsewhere(config: RunConfig, files: Iterable[Path]) -> list[Path]:
    """The file of routes that was asked for by name, where it is not among `files`."""
    routes = routes_of(config)
    path = Path(routes.path) if isinstance(routes, Routes) and routes.path is not None else None
    return [] if path is None or path in {file.absolute() for file in files} else [path]
