"""Copies from a device to pinned host memory, for which nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def copies_on_host(tensors: Sequence[Tensor]) -> tuple[list[Any], torch.cuda.Event | None]:
    """Copies on the host of tensors of one device, complete once the event has passed."""
    if tensors[0].device.type != "cuda":
        return [tensor.clone() for tensor in tensors], None
    with torch.cuda.device(tensors[0].device), torch.no_grad():
        copies = [_copy_to_pinned(tensor) for tensor in tensors]
        copied = torch.cuda.Event()
        copied.record()
    return copies, copied


def _copy_to_pinned(source: Tensor) -> Tensor:
    # The device is named, because a default device set by the user would be taken otherwise.
    target = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return target.copy_(source, non_blocking=True)
