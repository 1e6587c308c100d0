"""Block sizes that the fused kernels are compiled for, derived from a router's experts and slots."""

from __future__ import annotations

from typing import NamedTuple

_ELEMENTS = 2048  # elements of a tokens x experts block, which stays in registers
_COLUMNS_MAX = 1024


class Blocks(NamedTuple):
    """Block sizes of the kernels, the only values that are compiled into them."""

    BLOCK_T: int
    BLOCK_E: int
    BLOCK_S: int
    BLOCK_K: int
    BLOCK_X: int
    BLOCK_I: int


def block_sizes(num_experts: int, top_k: int, classes: int) -> Blocks | None:
    """Return the block sizes for E experts, K slots and C logits, or None if they exceed the registers."""
    if not 0 < max(classes, num_experts, top_k + 1) <= _COLUMNS_MAX:
        return None
    block_e = _next_power_of_2(max(classes, num_experts))
    return Blocks(
        BLOCK_T=max(1, _ELEMENTS // block_e),
        BLOCK_E=block_e,
        BLOCK_S=_next_power_of_2(top_k),
        BLOCK_K=_next_power_of_2(top_k + 1),
        BLOCK_X=_next_power_of_2(num_experts + 3),
        BLOCK_I=_next_power_of_2(num_experts + 2 + top_k + 1 + 2),
    )


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
