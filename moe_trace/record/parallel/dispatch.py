"""Data that a router call moves between processes: sizes known on the host, and counts made on the device.

Shape suffixes: L router calls reduced together, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_trace.record.reduce.stats import count_per_row


@dataclass(frozen=True, slots=True)
class DispatchInfo:
    """Data that one call of an experts module moves, as numbers known on the host."""

    slot_bytes: int | None
    """Size of a token's hidden state in bytes."""
    rows: tuple[int, int] | None = None
    """Range [start, stop) of the tokens that this process dispatches; None for all."""


def append_sent_counts(
    ints: Tensor, sending: DispatchInfo | None, index_TK: Sequence[Tensor], num_experts: int
) -> Tensor:
    """Append E counts of dispatched slots by expert to `ints` [L, n] if a slice of tokens is dispatched.

    Dispatch depends on the index alone: a slot of weight 0 is sent too.

    Args:
        index_TK: expert ids of each call, on one device.
    """
    if sending is None or sending.rows is None:
        return ints
    start, stop = sending.rows
    rows_LN = torch.stack([index[start:stop].flatten() for index in index_TK])
    outside = (rows_LN < 0) | (rows_LN >= num_experts)
    counts_LX = count_per_row(rows_LN.masked_fill(outside, num_experts), num_experts + 1)
    return torch.cat([ints, counts_LX[:, :num_experts].to(ints.dtype)], dim=-1)


def sent_counts(ints: np.ndarray, sending: DispatchInfo | None, num_experts: int) -> np.ndarray | None:
    """Return the counts [E] that `append_sent_counts` made for a call; None if all tokens are dispatched."""
    return None if sending is None or sending.rows is None else ints[-num_experts:]
