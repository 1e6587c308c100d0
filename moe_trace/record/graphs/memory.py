"""Device memory that graphs write to: made while one is being traced or captured, and kept for it.

What a capturing stream allocates comes from the pool of its graph, and may have been another captured
kernel's a moment before: each replay would write over it. What it fills is filled by each replay again. So
our memory is made on a stream beside the capture. CUDA's "global" capture mode forbids `cudaMalloc` there,
to every thread; "relaxed", which torch's own allocator switches to for what a capturing stream allocates,
allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.cuda import is_current_stream_capturing, is_initialized

from moe_trace.find.private.torch_names import without_fake_tensors
from moe_trace.record.graphs.cuda_driver import relaxed_capture_mode

_STREAMS_OF_TORCH = 32  # in its pool, which hands them out in turn

_written: dict[int, Tensor] = {}


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cuda_is_used() -> bool:
    """Whether anything in the process has used a GPU: else no stream can be captured."""
    return is_initialized()


def captures_now() -> bool:
    """Whether a stream of whatever device is current is being captured."""
    return is_initialized() and is_current_stream_capturing()


@contextmanager
def outside_graphs(device: torch.device) -> Iterator[None]:
    """Allocate and fill real memory that belongs to no graph, whatever is being traced or captured."""
    with without_fake_tensors() or nullcontext(), torch.inference_mode(False), torch.no_grad():
        if not is_capturing(device):
            yield
            return
        with relaxed_capture_mode(), torch.cuda.stream(_stream_beside(device)):
            yield
            # The graph's first replay may follow on any stream. Only a capture waits here, never a replay.
            torch.cuda.current_stream(device).synchronize()


def keep_for_graphs(tensors: list[Tensor]) -> None:
    """Keep memory that a captured graph writes to for as long as the process lives.

    Nothing tells when a `CUDAGraph` is gone, and one that is replayed after its tracer would write into
    whatever the memory had become.
    """
    _written.update((tensor.data_ptr(), tensor) for tensor in tensors)


def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """A stream that takes no part in a capture."""
    for _ in range(_STREAMS_OF_TORCH + 1):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream
    return torch.cuda.Stream(device, priority=-1)  # of another pool


def device_of(router: nn.Module) -> torch.device:
    """Where the router's weights are, which is where its decision is made."""
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    current = torch.cuda.current_device() if torch.cuda.is_available() else None
    return torch.device("cpu") if current is None else torch.device("cuda", current)
