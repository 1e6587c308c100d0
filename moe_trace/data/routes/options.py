"""Options for recording routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_trace.data.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Options for recording routes, passed as `routes=` to `MoETracer` and everything built on it.

    `routes=True` means `Routes()`.

    Args:
        weights: also keep the gating weights, as float16: twice the bytes of the expert ids.
        token_ids: also keep the ids of the prompt's tokens. They reveal users' text: off by default.
        max_mib: host memory for routes in mebibytes; tokens beyond it are dropped and counted.
        layers: which routers, as for `MoETracer`: layer indices, labels, module paths or a predicate.
        every: record the routes of every n-th recorded step.
        keep: what to keep once `max_mib` is reached: the `"newest"` tokens, or a `"reservoir"`, a uniform
            sample of all sequences seen.
        path: append to this file during the run; after a crash it can be read up to its last chunk, and what
            was written takes no memory.

    Raises:
        UsageError: `every` below 1, `max_mib` not above 0, or an unknown `keep`.
    """

    weights: bool = False
    token_ids: bool = False
    max_mib: float = 256
    layers: Sequence[Any] | Callable[[Any], bool] | None = None
    every: int = 1
    keep: Literal["newest", "reservoir"] = "newest"
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not self.max_mib > 0 or self.keep not in ("newest", "reservoir"):
            raise UsageError(
                'expected every >= 1, max_mib > 0 and keep "newest" or "reservoir"; '
                f"found every={self.every}, max_mib={self.max_mib}, keep={self.keep!r}"
            )
