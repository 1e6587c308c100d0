"""Profiler range for the few device operations that some contracts need to read a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_trace.data.schema import OVERHEAD_RANGE
from moe_trace.find.private.torch_names import enter_range, leave_range, thread_is_profiled


@contextmanager
def overhead_range() -> Iterator[None]:
    """Disable gradients and open a range of moe_trace, so that the cost is visible and attributed to it."""
    with torch.no_grad():
        # A range would cause a graph break in a compiled model.
        if not torch.compiler.is_compiling() and thread_is_profiled():
            entered = enter_range(OVERHEAD_RANGE)  # `record_function` imports a module when first used
            try:
                yield
            finally:
                leave_range(entered)
        else:
            yield
