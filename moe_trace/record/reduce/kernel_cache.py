"""Which fused kernels can be launched at once: they are imported and compiled before a step, never in one.

The first use of a Triton kernel in a process holds the host for seconds: Triton's import, the C compiler of
its launcher, and, with an empty cache on disk, the kernel itself.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from types import ModuleType

import torch

from moe_trace.find.contracts import RouterOutput
from moe_trace.record.reduce.block_sizes import Blocks, block_sizes
from moe_trace.record.reduce.streams import on_device

_FAILURES_MAX = 3  # of one device, after which it is not tried again


class FusedKernels:
    """The fused kernels that are ready, by device; where they are not, torch's operators reduce."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._ready: dict[torch.device, set[Blocks]] = defaultdict(set)
        self._failures: Counter[torch.device] = Counter()

    def prepare(self, device: torch.device, num_experts: int, top_k: int) -> None:
        """Make the kernels for E experts and K slots ready; may take seconds, so not within a step."""
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
        """The module of the kernels, if those that such a call needs can be launched at once."""
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
        """Building or launching them failed on a device, which is given up after some failures."""
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
"""Those of this process."""
