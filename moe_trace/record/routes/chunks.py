"""Transfer of expert ids to the host: cast on the device, copied to pinned memory, completed by an event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.data.routes.columns import id_type
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.reduce.stats import small_ids
from moe_trace.record.reduce.streams import copies_on_host, on_stream


@dataclass(slots=True, eq=False)
class Chunk:
    """The ids of several calls of the same shape."""

    records: list[CallRecord]
    num_experts: int
    ids: Any
    """[calls, T, K] uint8, or int16 that holds the bits of uint16."""
    weights: Any
    """[calls, T, K] float16, or None."""
    stream: int = 0
    copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return int(self.ids.nbytes + (0 if self.weights is None else self.weights.nbytes))

    def ship(self) -> None:
        """Start the copies to the host, without synchronizing."""
        tensors = [self.ids] if self.weights is None else [self.ids, self.weights]
        with on_stream(self.ids, self.stream), torch.no_grad():
            copies, self.copied = copies_on_host(tensors)
        self.ids, self.weights = (*copies, None)[:2]

    @property
    def arrived(self) -> bool:
        """Whether the copies are complete, so that reading does not wait."""
        return self.copied is None or self.copied.query()

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (ids as uint8 or uint16, weights or None) on the host. Waits for the copies."""
        if self.copied is not None:
            self.copied.synchronize()
        ids = self.ids.numpy().view(id_type(self.num_experts))
        return ids, None if self.weights is None else self.weights.numpy()


def cast(
    records: list[CallRecord],
    index: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_experts: int,
    stream: int,
    *,
    keep_weights: bool,
) -> Chunk:
    """Return the ids of these calls, cast on their device; see `small_ids`."""
    index_LTK, weights_LTK = _stack(index), _stack(weights)
    ids = small_ids(index_LTK, weights_LTK, num_experts)
    return Chunk(records, num_experts, ids, weights_LTK.half() if keep_weights else None, stream)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].detach().unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
