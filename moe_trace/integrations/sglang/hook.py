"""Routing in the traces of SGLang's own profiler, through its option `--forward-hooks`.

Follows `sglang.srt.model_executor.hook_manager`, but has not been run with it. Routers are read as described
in `find/contracts/engines/sglang.py`: eager mode, `--disable-cuda-graph`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from moe_trace.data.errors import MoETraceError
from moe_trace.find.private.torch_names import process_is_profiled
from moe_trace.record.tracer import MoETracer

Hook = Callable[[nn.Module, Any], None]


def trace_while_profiled(config: Mapping[str, Any]) -> Hook:
    """Return a forward pre-hook for the module `model` that records while a profiler does.

    SGLang calls it in each forward. Between profiles it makes one check, and no router has a hook.

        python -m sglang.launch_server --model-path MODEL --disable-cuda-graph --forward-hooks '[{"name":
            "moe_trace", "target_modules": ["model"], "hook_type": "forward_pre",
            "hook_factory": "moe_trace.integrations.sglang.hook:trace_while_profiled"}]'

    /start_profile and /stop_profile then write traces with the routing in them. A model without routers
    causes one warning.

    Args:
        config: keyword arguments of `MoETracer`, such as `{"routes": true}`.
    """
    return _FollowProfiler(dict(config)).before_forward


class _FollowProfiler:
    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._tracer: MoETracer | None = None
        self._ready = self._failed = False

    def before_forward(self, module: nn.Module, args: Any) -> None:
        profiled = process_is_profiled()
        if self._failed or (self._ready and profiled is (self._tracer is not None)):
            return
        try:
            self._update_tracer(module, profiled)
        except (MoETraceError, TypeError) as error:
            self._failed = True
            warnings.warn(f"the routing is not recorded: {error}", RuntimeWarning, stacklevel=2)

    def _update_tracer(self, module: nn.Module, profiled: bool) -> None:
        if not self._ready:  # first forward: compile kernels now, not while profiling
            with MoETracer(module, **self._config):
                self._ready = True
        if not profiled and self._tracer is not None:
            self._tracer.stop()
            self._tracer = None
        elif profiled:
            self._tracer = MoETracer(module, **self._config)
            self._tracer.start()
