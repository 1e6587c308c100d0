"""Rings on their way to the host: reduced in one batch of kernels, copied, and read as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type
from moe_trace.record.graphs.ids_ring import ShippedIds, room_for
from moe_trace.record.graphs.ring_buffer import EXACT, GraphRing, RingShape, raw_routes, reduce_rings
from moe_trace.record.reduce.pinned import copies_on_host


@dataclass(slots=True)
class Shipment:
    """The rings of one shape, reduced; on the host once `copied` has passed."""

    shape: RingShape
    sites: list[int]
    headers: Tensor
    ints: Tensor
    floats: Tensor
    copied: torch.cuda.Event | None
    ids: Any = None
    """[rows, tokens, K] of small calls, where routes are recorded."""
    weights: Any = None
    large: dict[int, ShippedIds] = field(default_factory=dict)
    """Ids of large ones, by room."""

    @property
    def rows(self) -> int:
        """One for each slot of each ring, written or not."""
        return len(self.headers)

    def wait(self) -> None:
        """Until it has arrived."""
        if self.copied is not None:
            self.copied.synchronize()


def ship(shape: RingShape, sites: list[int], rings: Sequence[GraphRing], *, routes: bool = False) -> Shipment:
    """Reduce the rings of these routers and start their copies to the host; nothing waits.

    Args:
        routes: copy the ids of small calls too.
    """
    headers, stats = reduce_rings(rings)
    tensors = [headers, stats.ints, stats.floats]
    if routes and shape.kind != "reduced":
        tensors += raw_routes(rings)
    host, copied = copies_on_host(tensors)
    return Shipment(shape, sites, host[0], host[1], host[2], copied, *host[3:])


class NewRows:
    """The rows of one shipment that were not drained before, on the host. Waits for it to arrive."""

    def __init__(self, shipped: Shipment, drained: Sequence[int]) -> None:
        shipped.wait()
        self._newest: dict[int, int] = {}
        """The last forward of each router."""
        self.shape, self._sites, self._drained = shipped.shape, shipped.sites, drained
        self.headers = shipped.headers.numpy()
        self.ints, self.floats = shipped.ints, shipped.floats
        self._shipped = shipped

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(router, row, forward number), in order of the forwards of each router."""
        slots = self.shape.slots
        for position, index in enumerate(self._sites):
            part = self.headers[position * slots : (position + 1) * slots]
            last = self._drained[index]
            ahead = (part[:, 0].astype(np.int64) - last) % EXACT
            new = np.flatnonzero((part[:, 3] > 0) & (ahead > 0) & (ahead < EXACT // 2))
            self._newest[index] = last + int(ahead[new].max(initial=0))
            for row in new[np.argsort(ahead[new], kind="stable")]:
                yield index, position * slots + int(row), last + int(ahead[row])

    def routes(self, index: int, row: int, forward: int, tokens: int) -> tuple[Any, Any]:
        """(ids, weights) [tokens, K] of one call; None for what was not kept. After `each`."""
        shipped = self._shipped
        if shipped.ids is not None:
            ids = shipped.ids[row, :tokens].numpy().view(id_type(self.shape.num_experts))
            return ids, shipped.weights[row, :tokens].numpy()
        large = shipped.large.get(room_for(tokens) or 0)
        return (None if large is None else large.of(index, forward, self._newest[index], tokens)), None
