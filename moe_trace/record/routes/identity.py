"""Whose token each row is: sequence, position and padding, from a forward's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_trace.data.routes.columns import UNKNOWN
from moe_trace.data.schema import STAGES
from moe_trace.record.forward.batch_tokens import DECODE, PADDING, BatchTokens
from moe_trace.record.routes.tokens import ForwardTokens


@dataclass(frozen=True)
class Identity:
    """[T] each, in the order of the rows that the routers saw."""

    sequence: np.ndarray
    position: np.ndarray
    padding: np.ndarray
    token_ids: np.ndarray | None
    stages: np.ndarray | None = None
    """Places in `STAGES`; None for the stage of the forward."""

    def take(self, rows: np.ndarray) -> Identity:
        """Of some rows."""
        ids = None if self.token_ids is None else self.token_ids[rows]
        stages = None if self.stages is None else self.stages[rows]
        return Identity(self.sequence[rows], self.position[rows], self.padding[rows], ids, stages)


def identity_of(tokens: ForwardTokens, count: int) -> Identity:
    """Of a block of `count` rows; nothing is known of one of other tokens than the model was given."""
    arrays = tokens.arrays()
    if tokens.batch is not None and len(tokens.batch) == count:
        return _reported(tokens.batch, arrays.get("token_ids"))
    if tokens.count != count or not count:
        unknown = np.full(count, UNKNOWN, np.int32)
        return Identity(unknown, unknown.copy(), np.zeros(count, bool), None)
    padding = arrays.get("padding", np.zeros(count, np.int32)).astype(bool).reshape(tokens.rows, -1)
    position = _positions(tokens, arrays, padding)
    starts = arrays.get("starts")
    if starts is not None and starts[0] == 0 and 0 < starts[-1] <= count and (np.diff(starts) >= 0).all():
        sequence = _between(starts, count).reshape(padding.shape)
        padding = padding | (sequence == UNKNOWN)  # up to the size of a graph
        if "positions" not in arrays and tokens.cached == 0:
            position = (np.arange(count) - starts[sequence.ravel()]).reshape(padding.shape)
    else:
        sequence = _sequences(tokens, position if "positions" in arrays else None, padding)
    ids = arrays.get("token_ids")
    return Identity(
        np.where(padding & (starts is not None), UNKNOWN, sequence).astype(np.int32).ravel(),
        np.where(padding, UNKNOWN, position).astype(np.int32).ravel(),
        padding.ravel(),
        ids,
    )


def _reported(batch: BatchTokens, token_ids: np.ndarray | None) -> Identity:
    padding, codes = batch.phases == PADDING, {phase: STAGES.index(phase) for phase in ("prefill", "decode")}
    decodes = (batch.phases == DECODE) | (padding & (batch.decode_tokens > 0))
    return Identity(
        np.where(padding, UNKNOWN, batch.requests).astype(np.int32),
        np.where(padding, UNKNOWN, batch.positions).astype(np.int32),
        padding,
        token_ids if token_ids is not None and len(token_ids) == len(batch) else None,
        np.where(decodes, codes["decode"], codes["prefill"]).astype(np.uint8),
    )


def _positions(tokens: ForwardTokens, arrays: Mapping[str, np.ndarray], padding: np.ndarray) -> np.ndarray:
    """[rows, length] positions within the sequences, padding not counted."""
    real = ~padding
    before = arrays.get("before")
    if before is None and tokens.cached is not None:
        before = np.full(tokens.rows, tokens.cached)
    counted = None if before is None else before[:, None] + real.cumsum(1) - 1
    told = arrays.get("positions")
    if told is None:
        return np.full(padding.shape, UNKNOWN) if counted is None or tokens.flat else counted
    told = told.reshape(padding.shape)
    if not padding.any() or tokens.cached != 0:
        return told
    # Who gives plain column numbers beside a mask counts padding too.
    columns = told == np.arange(tokens.length)
    return (
        np.where(columns.all(1, keepdims=True) & padding[:, :1], counted, told)
        if counted is not None
        else told
    )


def _between(starts: np.ndarray, count: int) -> np.ndarray:
    """The number of the packed sequence that each row lies in."""
    sequence = np.searchsorted(starts, np.arange(count), side="right") - 1
    return np.where(np.arange(count) < starts[-1], sequence, UNKNOWN)


def _sequences(tokens: ForwardTokens, position: np.ndarray | None, padding: np.ndarray) -> np.ndarray:
    """[rows, length]: the row of the batch; where positions start anew within a row, the packed sequence."""
    rows = np.broadcast_to(np.arange(tokens.rows)[:, None], padding.shape)
    if tokens.flat:  # one sequence, or many: their places do not tell
        rows = np.full(padding.shape, UNKNOWN)
    if position is None or tokens.length < 2:
        return rows
    both = ~padding[:, 1:] & ~padding[:, :-1]
    breaks = both & (position[:, 1:] != position[:, :-1] + 1)
    if not breaks.any():
        return rows
    if (position[:, 1:][breaks] != 0).any():  # several requests in a row, or a tree of drafts
        return np.full(padding.shape, UNKNOWN)
    first = np.ones((tokens.rows, 1), bool)
    starts = np.concatenate([first, breaks], axis=1)
    packed: np.ndarray = starts.ravel().cumsum().reshape(padding.shape) - 1
    return packed
