"""What a router call moves between processes: known without asking the device, or counted on it.

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
    """What one call of an experts module moves; plain numbers, known without asking the device."""

    slot_bytes: int | None
    """Bytes of a token's hidden state."""
    rows: tuple[int, int] | None = None
    """[start, stop) of the tokens that this process dispatches itself; None for all of them."""


def append_sent_counts(
    ints: Tensor, sending: DispatchInfo | None, index_TK: Sequence[Tensor], num_experts: int
) -> Tensor:
    """`ints` [L, n] with E columns more, where the L calls dispatch a slice of their tokens: slots by expert.

    What is dispatched follows the index alone: a slot of weight 0 travels too.

    Args:
        index_TK: of each call, on one device.
    """
    if sending is None or sending.rows is None:
        return ints
    start, stop = sending.rows
    rows_LN = torch.stack([index[start:stop].flatten() for index in index_TK])
    outside = (rows_LN < 0) | (rows_LN >= num_experts)
    counts_LX = count_per_row(rows_LN.masked_fill(outside, num_experts), num_experts + 1)
    return torch.cat([ints, counts_LX[:, :num_experts].to(ints.dtype)], dim=-1)


def sent_counts(ints: np.ndarray, sending: DispatchInfo | None, num_experts: int) -> np.ndarray | None:
    """[E] of one call from what `append_sent_counts` made; None where all tokens are dispatched."""
    return None if sending is None or sending.rows is None else ints[-num_experts:]
