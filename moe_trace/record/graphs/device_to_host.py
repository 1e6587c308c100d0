"""Rings on their way to the host: reduced in one batch of kernels, copied, and read as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_trace.record.graphs.ring_buffer import EXACT, GraphRing, RingShape, reduce_rings
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

    @property
    def rows(self) -> int:
        """One for each slot of each ring, written or not."""
        return len(self.headers)

    def wait(self) -> None:
        """Until it has arrived."""
        if self.copied is not None:
            self.copied.synchronize()


def ship(shape: RingShape, sites: list[int], rings: Sequence[GraphRing]) -> Shipment:
    """Reduce the rings of these routers and start their copies to the host; nothing waits."""
    headers, stats = reduce_rings(rings)
    host, copied = copies_on_host([headers, stats.ints, stats.floats])
    return Shipment(shape, sites, host[0], host[1], host[2], copied)


class NewRows:
    """The rows of one shipment that were not drained before, on the host. Waits for it to arrive."""

    def __init__(self, shipped: Shipment, drained: Sequence[int]) -> None:
        shipped.wait()
        self.shape, self._sites, self._drained = shipped.shape, shipped.sites, drained
        self.headers = shipped.headers.numpy()
        self.ints, self.floats = shipped.ints, shipped.floats

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(router, row, forward number), in order of the forwards of each router."""
        slots = self.shape.slots
        for position, index in enumerate(self._sites):
            part = self.headers[position * slots : (position + 1) * slots]
            last = self._drained[index]
            ahead = (part[:, 0].astype(np.int64) - last) % EXACT
            new = np.flatnonzero((part[:, 3] > 0) & (ahead > 0) & (ahead < EXACT // 2))
            for row in new[np.argsort(ahead[new], kind="stable")]:
                yield index, position * slots + int(row), last + int(ahead[row])
