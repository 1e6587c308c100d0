"""Expert ids of large calls inside graphs, where routes are recorded: in static buffers of their own.

Small calls need none: their decision stands in the ring as it is (`ring_buffer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type
from moe_trace.find.contracts import RouterOutput
from moe_trace.find.private.torch_names import mark_static_address
from moe_trace.record.graphs.ring_buffer import ForwardCounter
from moe_trace.record.reduce.pinned import copies_on_host
from moe_trace.record.reduce.small_ids import small_ids

ROOMS = (512, 4096, 32768)
"""Tokens that a slot may hold; the ids of larger calls are lost."""
_BYTES = 64 * 2**20  # of the rings of one room, over all sites
_SLOTS = 64  # at most; forwards


def room_for(tokens: int) -> int | None:
    """The slots that a call of so many tokens is written to."""
    return 512 if tokens <= 512 else 4096 if tokens <= 4096 else 32768 if tokens <= 32768 else None


class IdsRing:
    """One ring of one router: `data` is flat, [slots * room * top_k]."""

    def __init__(
        self, room: int, *, num_experts: int, top_k: int, sites: int, counter: ForwardCounter
    ) -> None:
        kind = id_type(num_experts)
        self.width, self.top_k, self.num_experts, self.counter = room * top_k, top_k, num_experts, counter
        self.slots = max(1, min(_SLOTS, _BYTES // (self.width * kind.itemsize * sites)))
        self.data = torch.zeros(
            self.slots * self.width,
            dtype=torch.uint8 if kind == np.uint8 else torch.int16,
            device=counter.device,
        )
        mark_static_address(self.data)

    def body(self, reading: RouterOutput) -> Tensor:
        """What `put` writes of a call; plain tensor work only."""
        return small_ids(reading.index_TK, reading.weights_TK.detach(), self.num_experts).flatten()

    def put(self, body: Tensor, tokens: int, code: int | None) -> None:
        """Write the ids of a call into the slot of the forward under way; arguments as of `GraphRing.put`."""
        slot = self.counter.forwards % self.slots
        where = slot * self.width + torch.arange(body.shape[0], device=body.device)
        self.data.index_put_((where,), body)


@dataclass(slots=True)
class ShippedIds:
    """The rings of one room on their way to the host."""

    rings: Sequence[IdsRing]
    sites: Sequence[int]
    data: Any
    copied: torch.cuda.Event | None

    def of(self, site: int, forward: int, newest: int, tokens: int) -> np.ndarray | None:
        """[tokens, K] of one call; None where it was written over. Waits for the copy.

        Args:
            newest: the last forward that may have been written.
        """
        if site not in self.sites:
            return None
        place = self.sites.index(site)
        ring = self.rings[place]
        if newest - forward >= ring.slots:
            return None
        if self.copied is not None:
            self.copied.synchronize()
        slots = self.data[place].numpy().view(id_type(ring.num_experts)).reshape(ring.slots, ring.width)
        found: np.ndarray = slots[forward % ring.slots, : tokens * ring.top_k].reshape(tokens, ring.top_k)
        return found


def ship_ids(sites: Sequence[int], rings: Sequence[IdsRing]) -> ShippedIds:
    """Start the copies of some rings to the host; nothing waits."""
    data, copied = copies_on_host([ring.data for ring in rings])
    return ShippedIds(rings, sites, data, copied)
