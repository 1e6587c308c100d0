"""Static buffers for the expert ids of large calls inside graphs, where routes are recorded.

Small calls need none: their rows in the rings hold the ids (`ring_buffer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type
from moe_trace.find.contracts import RouterOutput
from moe_trace.find.private.torch_names import mark_static_address
from moe_trace.record.graphs.ring_buffer import ForwardCounter
from moe_trace.record.reduce.stats import small_ids
from moe_trace.record.reduce.streams import copies_on_host

Room = Literal["ids_512", "ids_4096", "ids_32768"]
ROOMS: dict[Room, int] = {"ids_512": 512, "ids_4096": 4096, "ids_32768": 32768}
"""Tokens per slot; the ids of calls larger than the largest room are lost."""
_BYTES = 64 * 2**20  # maximum for the rings of one room, over all sites
_SLOTS = 64  # maximum number of forwards


def room_for(tokens: int) -> Room | None:
    """Return the room for a call of `tokens` tokens, or None if it is too large."""
    if tokens <= ROOMS["ids_4096"]:
        return "ids_512" if tokens <= ROOMS["ids_512"] else "ids_4096"
    return "ids_32768" if tokens <= ROOMS["ids_32768"] else None


class IdsRing:
    """One ring of expert ids of one router: `data` is flat, [slots * room * top_k]."""

    def __init__(
        self, room: Room, *, num_experts: int, top_k: int, sites: int, counter: ForwardCounter
    ) -> None:
        kind = id_type(num_experts)
        self.width, self.top_k = ROOMS[room] * top_k, top_k
        self.num_experts, self.counter = num_experts, counter
        self.slots = max(1, min(_SLOTS, _BYTES // (self.width * kind.itemsize * sites)))
        self.data = torch.zeros(
            self.slots * self.width,
            dtype=torch.uint8 if kind == np.uint8 else torch.int16,
            device=counter.device,
        )
        mark_static_address(self.data)

    def body(self, reading: RouterOutput) -> Tensor:
        """Return the flat ids that `put` writes for a call, using tensor operations only."""
        return small_ids(reading.index_TK, reading.weights_TK.detach(), self.num_experts).flatten()

    def put(self, body: Tensor, tokens: int, code: int | None) -> None:
        """Write the ids of a call into the slot of the forward in progress; see `GraphRing.put`."""
        slot = self.counter.forwards % self.slots
        positions = slot * self.width + torch.arange(body.shape[0], device=body.device)
        self.data.index_put_((positions,), body)


class ShippedIds:
    """Rings of ids in transfer to the host; the constructor starts the copies without waiting for them.

    Args:
        rings: rings of one device, by index of the router and room.
    """

    def __init__(self, rings: Mapping[tuple[int, Room], IdsRing]) -> None:
        self._rings = rings
        data, self._copied = copies_on_host([ring.data for ring in rings.values()]) if rings else ([], None)
        self._data = dict(zip(rings, data, strict=True))

    def of(self, site: int, forward: int, newest: int, tokens: int) -> np.ndarray | None:
        """Return the ids [tokens, K] of one call, or None if not kept or overwritten. Waits for the copy.

        Args:
            newest: number of the last forward that may have been written.
        """
        room = room_for(tokens)
        ring = None if room is None else self._rings.get((site, room))
        if room is None or ring is None or newest - forward >= ring.slots:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        slots = self._data[site, room].numpy().view(id_type(ring.num_experts)).reshape(ring.slots, ring.width)
        found: np.ndarray = slots[forward % ring.slots, : tokens * ring.top_k].reshape(tokens, ring.top_k)
        return found
