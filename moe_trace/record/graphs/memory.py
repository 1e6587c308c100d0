"""Device memory that graphs write to: allocated while a graph is traced or captured, and kept alive for it.

Memory that a capturing stream allocates comes from the pool of its graph and may have belonged to another
captured kernel before, so that each replay would overwrite it; and each replay would repeat its
initialization. Our memory is therefore allocated on a stream outside the capture. CUDA's "global" capture
mode forbids `cudaMalloc` to every thread; "relaxed", which torch's own allocator switches to for the
allocations of a capturing stream, allows it.
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
    """Return whether the device's current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cuda_is_used() -> bool:
    """Return whether the process has initialized CUDA; if not, no stream can be captured."""
    return is_initialized()


def captures_now() -> bool:
    """Return whether the current stream of the current device is being captured."""
    return is_initialized() and is_current_stream_capturing()


@contextmanager
def outside_graphs(device: torch.device) -> Iterator[None]:
    """Allocate and fill real memory that belongs to no graph, whatever is being traced or captured."""
    with without_fake_tensors() or nullcontext(), torch.inference_mode(False), torch.no_grad():
        if not is_capturing(device):
            yield
            return
        with relaxed_capture_mode(), torch.cuda.stream(_side_stream(device)):
            yield
            # The graph may be replayed on any stream. Only a capture waits here, never a replay.
            torch.cuda.current_stream(device).synchronize()


def keep_for_graphs(tensors: list[Tensor]) -> None:
    """Keep memory that a captured graph writes to alive until the process exits.

    The destruction of a `CUDAGraph` cannot be observed, and one replayed after its tracer was deleted would
    write into memory that has been reused.
    """
    _written.update((tensor.data_ptr(), tensor) for tensor in tensors)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that takes no part in a capture."""
    for _ in range(_STREAMS_OF_TORCH + 1):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream
    return torch.cuda.Stream(device, priority=-1)  # from another pool


def device_of(router: nn.Module) -> torch.device:
    """Return the device of the router's weights, on which it decides; else the current GPU, or the CPU."""
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    current = torch.cuda.current_device() if torch.cuda.is_available() else None
    return torch.device("cpu") if current is None else torch.device("cuda", current)
