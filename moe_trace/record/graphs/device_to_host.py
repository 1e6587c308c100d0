"""Transfer of rings to the host: reduced in one batch of kernels, copied, and read as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type
from moe_trace.record.calls.call import CallRecord, Records
from moe_trace.record.calls.samples import Batch
from moe_trace.record.graphs.ids_ring import ShippedIds
from moe_trace.record.graphs.ring_buffer import (
    EXACT,
    PHASES_MAX,
    GraphRing,
    RingShape,
    raw_routes,
    reduce_rings,
    unpad,
)
from moe_trace.record.reduce.streams import copies_on_host


@dataclass(slots=True)
class Shipment:
    """The reduced rings of one shape, on the host once the event `copied` has completed."""

    shape: RingShape
    sites: list[int]
    headers: Tensor
    ints: Tensor
    floats: Tensor
    copied: torch.cuda.Event | None
    ids: Any = None
    """Expert ids of small calls, [rows, tokens, K], where routes are recorded."""
    weights: Any = None
    """Gating weights of small calls, shaped like `ids`, where routes are recorded."""
    large: ShippedIds | None = None
    """Expert ids of large calls, where routes are recorded."""
    _newest: dict[int, int] = field(default_factory=dict)
    """Number of the last forward of each router."""

    @property
    def rows(self) -> int:
        """Number of rows: one for each slot of each ring, written or not."""
        return len(self.headers)

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()

    def new_rows(self, drained: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (router, row, forward number) of new rows, by forward for each router; call after `wait`.

        Args:
            drained: number of the last forward of each router whose row has been read.
        """
        slots = self.shape.slots
        headers: np.ndarray = self.headers.numpy()
        for position, index in enumerate(self.sites):
            part = headers[position * slots : (position + 1) * slots]
            last = drained[index]
            offset = (part[:, 0].astype(np.int64) - last) % EXACT
            new = np.flatnonzero((part[:, 3] > 0) & (offset > 0) & (offset < EXACT // 2))
            self._newest[index] = last + int(offset[new].max(initial=0))
            for row in new[np.argsort(offset[new], kind="stable")]:
                yield index, position * slots + int(row), last + int(offset[row])

    def batch(self, row: int, record: CallRecord, tokens: int) -> Batch:
        """Return the reduced values of one call."""
        ints = self.ints[row : row + 1].clone()
        unpad(self.shape, ints, tokens)
        return Batch(
            Records([record]),
            top_k=self.shape.top_k,
            tokens=tokens,
            num_experts=self.shape.num_experts,
            classes=self.shape.classes,
            ints=ints,
            floats=self.floats[row : row + 1],
            in_phases=self.shape.tells and tokens <= PHASES_MAX,
            num_slots=self.shape.num_slots,
        )

    def routes(self, index: int, row: int, forward: int, tokens: int) -> tuple[Any, Any]:
        """Return (ids, weights) [tokens, K] of one call, each None if not kept; call after `new_rows`."""
        if self.ids is not None:
            ids = self.ids[row, :tokens].numpy().view(id_type(self.shape.num_experts))
            return ids, self.weights[row, :tokens].numpy()
        large = self.large
        return (None if large is None else large.of(index, forward, self._newest[index], tokens)), None


def ship(shape: RingShape, sites: list[int], rings: Sequence[GraphRing], *, routes: bool = False) -> Shipment:
    """Reduce the rings of these routers and start their copies to the host, without synchronizing.

    Args:
        routes: also copy the ids and weights of small calls.
    """
    headers, stats = reduce_rings(rings)
    tensors = [headers, stats.ints, stats.floats]
    if routes and shape.kind != "reduced":
        tensors += raw_routes(rings)
    host, copied = copies_on_host(tensors)
    return Shipment(shape, sites, host[0], host[1], host[2], copied, *host[3:])
