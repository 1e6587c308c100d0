"""One decision whose experts are called several times: in tiles, slot by slot, hot and cold ones apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_trace.find.contracts.contract import AdapterMismatch
from moe_trace.find.contracts.overhead_range import overhead_range


def combined_choice(
    choices: Sequence[tuple[Tensor, Tensor]], logits_shape: tuple[int, int] | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """(index [T, K], weights [T, K]) of all calls together.

    Args:
        choices: (index, weights) of each call, in order.
        logits_shape: (T, E) of the router's logits; None where it has none.
        top_k: K; 0 where it is not known.

    Raises:
        AdapterMismatch: the calls do not make up the router's tokens.
    """
    tokens, experts = logits_shape or (choices[0][0].shape[0], 2**31)
    rows, slots = [i.shape[0] for i, _ in choices], [i.shape[1] for i, _ in choices]
    with overhead_range():
        if len(set(slots)) == 1 and sum(rows) == tokens:
            return _joined(choices, dim=0)
        if set(rows) != {tokens}:
            raise AdapterMismatch(
                f"expected the {len(choices)} calls of the experts to make up {tokens} tokens, found {rows}"
            )
        if sum(slots) == top_k or len(set(slots)) > 1:
            return _joined(choices, dim=1)
        return _slots_of_any(choices, experts)


def with_skipped(index: Tensor, weights: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[tokens, K] of index and weights of fewer tokens: the others were dropped, their slots are skipped."""
    dropped = tokens - index.shape[0]
    with overhead_range():
        return functional.pad(index, (0, 0, 0, dropped), value=-1), functional.pad(
            weights, (0, 0, 0, dropped)
        )


def _joined(choices: Sequence[tuple[Tensor, Tensor]], *, dim: int) -> tuple[Tensor, Tensor]:
    return torch.cat([i for i, _ in choices], dim), torch.cat([w for _, w in choices], dim)


def _slots_of_any(choices: Sequence[tuple[Tensor, Tensor]], experts: int) -> tuple[Tensor, Tensor]:
    """Each slot as the first call had it in which it was not masked out."""
    index, weights = choices[0]
    for other_index, other_weights in choices[1:]:
        unused = (weights == 0) | (index < 0) | (index >= experts)
        index = torch.where(unused, other_index, index)
        weights = torch.where(unused, other_weights, weights)
    return index, weights
