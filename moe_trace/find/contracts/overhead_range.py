"""Mark the few device operations that some contracts need to read a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_trace.data.schema import OVERHEAD_RANGE
from moe_trace.find.private.torch_names import enter_range, leave_range, thread_is_profiled


@contextmanager
def overhead_range() -> Iterator[None]:
    """Without gradients, and in a range of our own: the cost stays visible and is nobody else's."""
    with torch.no_grad():
        # A range would break the graph of whoever compiles the model.
        if not torch.compiler.is_compiling() and thread_is_profiled():
            entered = enter_range(OVERHEAD_RANGE)  # torch's own class imports a module at its first use
            try:
                yield
            finally:
                leave_range(entered)
        else:
            yield
