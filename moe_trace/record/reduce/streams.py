"""Work on the stream that made a tensor, without waiting and without a bond between streams."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.private.torch_names import current_stream_handle


def stream_of_now(tensor: Tensor) -> int:
    """Handle of the current stream on the tensor's device; 0 on a CPU, as for the default stream."""
    return current_stream_handle(tensor.device) if tensor.is_cuda else 0


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one; nothing to do for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_stream(tensor: Tensor, stream: int) -> AbstractContextManager[Any]:
    """Make `stream` the current one on the tensor's device; nothing to do where it is already."""
    if stream_of_now(tensor) == stream:
        return nullcontext()
    external: Any = torch.cuda.ExternalStream(stream, device=tensor.device)
    return torch.cuda.stream(external)
