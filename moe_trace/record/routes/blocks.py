"""Calls of one forward joined into rows, in bounded host memory."""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moe_trace.data.routes.columns import UNKNOWN
from moe_trace.data.schema import Stage
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.routes.identity import Columns, identity_of
from moe_trace.record.routes.tokens import ForwardTokens

_TOKEN_BYTES = 32  # bytes of a row without its ids
_COLUMN_BYTES, _BLOCK_BYTES = 128, 1580  # bytes of Python objects, most of the memory of a decode step
_FORWARDS_BEHIND = 1024  # forwards whose ids may still be on a device
_DROP_SHARE = 8  # at least an eighth of a block's rows are dropped at once, to limit the number of copies


@dataclass(slots=True, eq=False)
class Block:
    """T rows, one for each token of a forward, of the layers that saw the same tokens."""

    key: tuple[object, ...]
    order: tuple[int, int]
    step: int
    stage: Stage
    tokens: ForwardTokens
    count: int
    """Number of rows that the routers saw."""
    kept: np.ndarray | None = None
    """Indices of the rows that are kept; None for all."""
    ids: dict[int, np.ndarray] = field(default_factory=dict)
    """Expert ids [T, K] of the kept rows, by router."""
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    calls: array[int] = field(default_factory=lambda: array("q"))
    """Call numbers, in the order of `ids`; -1 for calls in graphs."""
    lost: set[int] = field(default_factory=set)
    """Routers whose assignments turned out to be unknown."""
    recomputed: bool = False
    _identity: Columns | None = None

    @property
    def rows(self) -> int:
        return self.count if self.kept is None else len(self.kept)

    @property
    def row_bytes(self) -> int:
        """Bytes of each kept row."""
        columns = [*self.ids.values(), *self.weights.values()]
        return _TOKEN_BYTES + sum(column.shape[1] * column.itemsize for column in columns)

    @property
    def nbytes(self) -> int:
        columns = len(self.ids) + len(self.weights)
        return self.rows * self.row_bytes + columns * _COLUMN_BYTES + _BLOCK_BYTES

    def add(self, router: int, ids: np.ndarray, weights: np.ndarray | None, call: int) -> None:
        """Add a copy of one router's ids [T, K] and weights."""
        rows = slice(None) if self.kept is None else self.kept
        self.ids[router] = np.array(ids[rows])
        self.calls.append(call)
        if weights is not None:
            self.weights[router] = np.array(weights[rows])

    def decided(self) -> list[tuple[int, int]]:
        """Return (router, call number) of calls not lost; calls in graphs, never lost, are omitted."""
        calls = zip(self.ids, self.calls, strict=True)
        return [(router, call) for router, call in calls if call >= 0 and router not in self.lost]

    def keep(self, rows: np.ndarray) -> int:
        """Keep some of the rows that are left, by index or mask, and return how many were dropped."""
        before = self.rows
        self.kept = np.arange(self.count)[rows] if self.kept is None else self.kept[rows]
        for columns in (self.ids, self.weights):
            for router, column in columns.items():
                columns[router] = column[rows]
        return before - self.rows

    def identity(self) -> Columns:
        """Return the identity columns of the kept rows."""
        if self._identity is None:
            self._identity = identity_of(self.tokens, self.count, self.stage)
        kept = slice(None) if self.kept is None else self.kept
        return {name: column[kept] for name, column in self._identity.items()}


class Blocks:
    """The blocks in memory, in the order of the forwards.

    Args:
        max_bytes: limit beyond which rows are dropped, and counted in `dropped`.
        keep: `"newest"` to keep the newest rows; `"reservoir"` to give each sequence a random number and drop
            those with the greatest, including what is decoded for them later (bottom-k sampling).
    """

    def __init__(self, max_bytes: int, keep: Literal["newest", "reservoir"]) -> None:
        self.max_bytes, self._keep = max_bytes, keep
        self.blocks: list[Block] = []
        self.nbytes = 0
        self.dropped: Counter[str] = Counter()
        """Number of dropped rows, by reason."""
        self._by_key: dict[tuple[object, ...], list[Block]] = {}
        self._recomputed: dict[tuple[object, ...], None] = {}
        """Keys of recomputed blocks that have not been added yet."""
        self._threshold = 1.0
        """Sequences with this random number or a greater one are dropped."""

    def add(
        self,
        record: CallRecord,
        router: int,
        ids: np.ndarray,
        weights: np.ndarray | None,
        *,
        part: int = 0,
        lost: bool = False,
    ) -> None:
        """Add the ids and weights of one call.

        Args:
            part: number of the part of the model, if parts such as an encoder see different tokens.
            lost: whether the assignments turned out to be unknown.
        """
        block = self._block(record, router, len(ids), part)
        before = block.nbytes
        block.add(router, ids, weights, -1 if record.in_graph else record.call)
        if lost:
            block.lost.add(router)
        self.nbytes += block.nbytes - before
        if self.nbytes > self.max_bytes:
            self._drop_oldest() if self._keep == "newest" else self._drop_sequences(block)

    def recomputed(self, record: CallRecord, count: int, part: int) -> None:
        """Mark the blocks of a call as recomputed by the backward."""
        key = (record.order, id(record.tokens), count, part)
        if key not in self._by_key:  # still on the device, or dropped
            self._recomputed[key] = None
            if len(self._recomputed) > _FORWARDS_BEHIND:
                del self._recomputed[next(iter(self._recomputed))]
        for block in self._by_key.get(key, ()):
            block.recomputed = True

    def take(self, *, but: int = 0) -> list[Block]:
        """Remove and return all blocks but the last `but`."""
        end = max(0, len(self.blocks) - but)
        taken, self.blocks = self.blocks[:end], self.blocks[end:]
        self._forget(taken)
        return taken

    def _block(self, record: CallRecord, router: int, count: int, part: int) -> Block:
        key = (record.order, id(record.tokens), count, part)
        found = self._by_key.setdefault(key, [])
        for block in found:
            if router not in block.ids:
                return block
        tokens = record.tokens
        block = Block(key, record.order, record.step, record.stage, tokens, count)
        if self._threshold < 1:
            self.dropped["reservoir"] += block.keep(self._numbers(block) < self._threshold)
        block.recomputed = key in self._recomputed
        found.append(block)
        insort(self.blocks, block, key=lambda item: item.order)  # calls of other shapes may arrive earlier
        self.nbytes += block.nbytes
        return block

    def _forget(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.nbytes -= block.nbytes
            found = self._by_key[block.key]
            found.remove(block)
            if not found:
                del self._by_key[block.key]

    def _drop_oldest(self) -> None:
        excess, count = self.nbytes - self.max_bytes, 0
        while excess > 0 and count < len(self.blocks):
            block = self.blocks[count]
            if block.nbytes <= excess:
                excess -= block.nbytes
                self.dropped["overwritten"] += block.rows
                count += 1
                continue
            rows = min(block.rows, max(-(-excess // block.row_bytes), block.rows // _DROP_SHARE))
            self.nbytes -= rows * block.row_bytes
            self.dropped["overwritten"] += block.keep(np.arange(rows, block.rows))
            break
        dropped, self.blocks = self.blocks[:count], self.blocks[count:]
        self._forget(dropped)

    def _drop_sequences(self, latest: Block) -> None:
        """Drop sequences from all blocks; keep `latest`, to which other layers will be added."""
        limit = self.max_bytes * 7 // 8  # leaves room for later blocks
        while self.nbytes > limit and any(block.rows for block in self.blocks):
            numbers = [self._numbers(block) for block in self.blocks]
            merged = np.sort(np.concatenate(numbers))
            share = min(7 / 8, limit / self.nbytes)
            self._threshold = float(merged[int(share * len(merged))])
            for block, block_numbers in zip(self.blocks, numbers, strict=True):
                if (block_numbers >= self._threshold).any():
                    self.nbytes -= block.nbytes
                    self.dropped["reservoir"] += block.keep(np.flatnonzero(block_numbers < self._threshold))
                    self.nbytes += block.nbytes
            self._forget([block for block in self.blocks if not block.rows and block is not latest])
            self.blocks = [block for block in self.blocks if block.rows or block is latest]

    @staticmethod
    def _numbers(block: Block) -> np.ndarray:
        """Return the random number in [0, 1) of each row's sequence, [rows], the same in all its forwards."""
        sequence = block.identity()["sequence"].astype(np.int64)
        # Rows of a forward whose sequences are unknown count as one sequence.
        owner = np.where(sequence == UNKNOWN, -1 - block.order[0] * 4096 - block.order[1], block.tokens.run)
        state = owner.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + sequence.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        numbers: np.ndarray = (state ^ (state >> np.uint64(31))) / 2.0**64
        return numbers
