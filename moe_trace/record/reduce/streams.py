"""Helpers to run on the stream that produced a tensor, and to copy to pinned memory without synchronizing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.private.torch_names import current_stream_handle


def stream_of_now(tensor: Tensor) -> int:
    """Return the handle of the current stream on the tensor's device; 0 on a CPU, like the default stream."""
    return current_stream_handle(tensor.device) if tensor.is_cuda else 0


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that makes a GPU the current device; it does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_stream(tensor: Tensor, stream: int) -> AbstractContextManager[Any]:
    """Return a context that makes `stream` the current stream on the tensor's device, if it is not."""
    if stream_of_now(tensor) == stream:
        return nullcontext()
    external: Any = torch.cuda.ExternalStream(stream, device=tensor.device)
    return torch.cuda.stream(external)


def copies_on_host(tensors: Sequence[Tensor]) -> tuple[list[Any], torch.cuda.Event | None]:
    """Copy tensors of one device to the host; the copies are complete once the returned event has."""
    if tensors[0].device.type != "cuda":
        return [tensor.clone() for tensor in tensors], None
    with torch.cuda.device(tensors[0].device), torch.no_grad():
        copies = [_copy_to_pinned(tensor) for tensor in tensors]
        copied = torch.cuda.Event()
        copied.record()
    return copies, copied


def _copy_to_pinned(source: Tensor) -> Tensor:
    # The device is explicit, since the user may have set another default device.
    target = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return target.copy_(source, non_blocking=True)
