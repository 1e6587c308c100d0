"""Registry of fused kernels that are ready to launch; they are imported and compiled outside of steps.

The first use of a Triton kernel in a process blocks the host for seconds: for importing Triton, compiling
its launcher in C and, with an empty cache on disk, compiling the kernel itself.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from types import ModuleType

import torch

from moe_trace.find.contracts import RouterOutput
from moe_trace.record.reduce.block_sizes import Blocks, block_sizes
from moe_trace.record.reduce.streams import on_device

_FAILURES_MAX = 3  # per device, after which it is not tried again


class FusedKernels:
    """The fused kernels that are ready, by device; elsewhere, torch operators do the reduction."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._ready: dict[torch.device, set[Blocks]] = defaultdict(set)
        self._failures: Counter[torch.device] = Counter()

    def prepare(self, device: torch.device, num_experts: int, top_k: int) -> None:
        """Compile the kernels for E experts and K slots; may take seconds, so do not call it in a step."""
        if self._failures[device] >= _FAILURES_MAX:
            return
        try:
            blocks = block_sizes(num_experts, top_k, num_experts)
            if blocks is None or blocks in self._ready[device]:
                return
            from moe_trace.record.reduce import triton_kernels as fused_stats

            logits = torch.zeros((1, num_experts), device=device)
            weights = torch.ones((1, top_k), device=device)
            index = torch.zeros((1, top_k), dtype=torch.int64, device=device)
            with on_device(device):
                fused_stats.fused_routing_stats([logits], [weights], [index], num_experts, None)
            self._module = fused_stats
            self._ready[device].add(blocks)
        except Exception as error:  # Triton is missing, too old, or lacks the C compiler that it calls
            self.failed(device, error)

    def ready_for(self, reading: RouterOutput, num_experts: int) -> ModuleType | None:
        """Return the module of the kernels if those for this call are ready, else None."""
        if self._module is None:
            return None
        logits, index = reading.logits_TE, reading.index_TK
        classes = 0 if logits is None else logits.shape[-1]
        blocks = block_sizes(num_experts, index.shape[-1], classes)
        if blocks not in self._ready[index.device] or not self._module.fits(
            logits, reading.weights_TK, index
        ):
            return None
        return self._module

    def failed(self, device: torch.device, error: Exception) -> None:
        """Count a failure to build or launch kernels on a device, and give up after several; warn once."""
        self._failures[device] += 1
        if self._failures[device] == _FAILURES_MAX:
            self._ready[device].clear()
        if self._failures[device] == 1:
            warnings.warn(
                f"the fused kernels of moe_trace do not run on {device}, so figures are reduced by some 45 "
                "small ones, which cost more of the device "
                f"({type(error).__name__}: {str(error).strip()[:200]})",
                RuntimeWarning,
                stacklevel=3,
            )


FUSED = FusedKernels()
"""Fused kernels of this process."""
