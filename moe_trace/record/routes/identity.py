"""Sequence, position and padding of each row, from a forward's arguments."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_trace.data.routes.columns import UNKNOWN
from moe_trace.data.schema import STAGES, Stage
from moe_trace.record.forward.batch_tokens import DECODE, PADDING, BatchTokens
from moe_trace.record.routes.tokens import ForwardTokens

Columns = dict[str, np.ndarray]
"""Columns [T] by their names in `RecordedRoutes`, in the order of the rows that the routers saw: `sequence`,
`position`, `padding`, `stage_codes`, and `token_ids` where they are known."""


def identity_of(tokens: ForwardTokens, count: int, stage: Stage) -> Columns:
    """Return the identity columns of a block; they are unknown if its tokens are not the model's input.

    Args:
        tokens: description of the forward's tokens.
        count: number of rows of the block.
        stage: stage of the forward, used for tokens whose own stage is unknown.
    """
    arrays = tokens.arrays()
    ids = arrays.get("token_ids")
    if tokens.batch is not None and len(tokens.batch) == count:
        return _reported(tokens.batch) | _known(ids, count)
    stages = {"stage_codes": np.full(count, STAGES.index(stage), np.uint8)}
    if tokens.count != count or not count:
        unknown = np.full(count, UNKNOWN, np.int32)
        return {"sequence": unknown, "position": unknown, "padding": np.zeros(count, bool), **stages}
    padding = arrays.get("padding", np.zeros(count, np.int32)).astype(bool).reshape(tokens.rows, -1)
    position = _positions(tokens, arrays, padding)
    starts = arrays.get("starts")
    if starts is not None and starts[0] == 0 and 0 < starts[-1] <= count and (np.diff(starts) >= 0).all():
        sequence = _sequence_indices(starts, count).reshape(padding.shape)
        padding = padding | (sequence == UNKNOWN)  # padding up to the batch size of a CUDA graph
        if "positions" not in arrays and tokens.cached == 0:
            position = (np.arange(count) - starts[sequence.ravel()]).reshape(padding.shape)
    else:
        sequence = _sequences(tokens, position if "positions" in arrays else None, padding)
    return {
        "sequence": np.where(padding & (starts is not None), UNKNOWN, sequence).astype(np.int32).ravel(),
        "position": np.where(padding, UNKNOWN, position).astype(np.int32).ravel(),
        "padding": padding.ravel(),
        **stages,
        **_known(ids, count),
    }


def _known(token_ids: np.ndarray | None, count: int) -> Columns:
    return {"token_ids": token_ids} if token_ids is not None and len(token_ids) == count else {}


def _reported(batch: BatchTokens) -> Columns:
    padding, codes = batch.phases == PADDING, {phase: STAGES.index(phase) for phase in ("prefill", "decode")}
    decodes = (batch.phases == DECODE) | (padding & (batch.decode_tokens > 0))
    return {
        "sequence": np.where(padding, UNKNOWN, batch.requests).astype(np.int32),
        "position": np.where(padding, UNKNOWN, batch.positions).astype(np.int32),
        "padding": padding,
        "stage_codes": np.where(decodes, codes["decode"], codes["prefill"]).astype(np.uint8),
    }


def _positions(tokens: ForwardTokens, arrays: Mapping[str, np.ndarray], padding: np.ndarray) -> np.ndarray:
    """Return the positions within the sequences, [rows, length], not counting padding."""
    real = ~padding
    before = arrays.get("before")
    if before is None and tokens.cached is not None:
        before = np.full(tokens.rows, tokens.cached)
    counted = None if before is None else before[:, None] + real.cumsum(1) - 1
    positions = arrays.get("positions")
    if positions is None:
        return np.full(padding.shape, UNKNOWN) if counted is None or tokens.flat else counted
    positions = positions.reshape(padding.shape)
    if not padding.any() or tokens.cached != 0:
        return positions
    # Positions that are plain column indices count padding too, so the mask is counted instead.
    columns = positions == np.arange(tokens.length)
    return (
        np.where(columns.all(1, keepdims=True) & padding[:, :1], counted, positions)
        if counted is not None
        else positions
    )


def _sequence_indices(starts: np.ndarray, count: int) -> np.ndarray:
    """Return the index of each row's packed sequence, or `UNKNOWN` for rows after the last one."""
    sequence = np.searchsorted(starts, np.arange(count), side="right") - 1
    return np.where(np.arange(count) < starts[-1], sequence, UNKNOWN)


def _sequences(tokens: ForwardTokens, position: np.ndarray | None, padding: np.ndarray) -> np.ndarray:
    """Return sequence numbers [rows, length]: batch rows, or packed sequences where positions restart."""
    rows = np.broadcast_to(np.arange(tokens.rows)[:, None], padding.shape)
    if tokens.flat:  # there may be one sequence or many
        rows = np.full(padding.shape, UNKNOWN)
    if position is None or tokens.length < 2:
        return rows
    both_real = ~padding[:, 1:] & ~padding[:, :-1]
    breaks = both_real & (position[:, 1:] != position[:, :-1] + 1)
    if not breaks.any():
        return rows
    if (position[:, 1:][breaks] != 0).any():  # several requests in a row, or a tree of drafts
        return np.full(padding.shape, UNKNOWN)
    first = np.ones((tokens.rows, 1), bool)
    starts = np.concatenate([first, breaks], axis=1)
    packed: np.ndarray = starts.ravel().cumsum().reshape(padding.shape) - 1
    return packed
