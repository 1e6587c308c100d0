"""Assignments per expert and observation, the input of all placement plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.errors import UsageError

Kind = Literal["step", "text"]
MAX_EXPERTS = 8192
_MAX_EXACT = 2**53  # loads are summed as floats, which are exact below this


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The router that a row of counts belongs to."""

    site: str
    name: str = ""
    layer: int | None = None
    slot_bytes: int | None = None
    """Bytes that one dispatched slot moves in one direction, or None if unknown."""


@dataclass(frozen=True, kw_only=True)
class ExpertCounts:
    """Assignments of each observation. All layers have the same number of experts."""

    source: str
    model: str
    kind: Kind
    labels: tuple[str, ...]
    """[S] step numbers or names of texts."""
    layers: tuple[Layer, ...]
    counts_SLE: npt.NDArray[np.int64]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Validate the counts.

        Raises:
            UsageError: The counts are empty, negative, too large, or lack a row for a layer and observation.
        """
        counts = self.counts_SLE
        expected = (len(self.labels), len(self.layers))
        if counts.ndim != 3 or counts.shape[:2] != expected or 0 in counts.shape:
            raise UsageError(
                f"{self.source}: found counts of the form {list(counts.shape)}, expected "
                f"[{expected[0]} {self.kind}s, {expected[1]} layers, experts], none of them 0"
            )
        if self.num_experts > MAX_EXPERTS:
            raise UsageError(
                f"{self.source}: found {self.num_experts} experts a layer, expected at most {MAX_EXPERTS}; "
                "experts this small are not placed one by one"
            )
        if counts.min() < 0:
            raise UsageError(f"{self.source}: found a negative count, expected numbers of assignments")
        if counts.sum(dtype=np.float64) >= _MAX_EXACT:
            raise UsageError(f"{self.source}: found counts that add up to 2^53 or more; scale them down")
        if not counts.any():
            raise UsageError(
                f"{self.source}: found no assignment in any layer, so there is no load to place; record a "
                "forward with tokens"
            )

    @property
    def num_experts(self) -> int:
        """Number of experts E, the same in every layer."""
        return int(self.counts_SLE.shape[2])
