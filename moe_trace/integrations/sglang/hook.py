"""The routing in the traces that SGLang's own profiler writes, by its option `--forward-hooks`.

Written after `sglang.srt.model_executor.hook_manager`, and not run on it. Routers are read as
`find/contracts/engines/sglang.py` says: eager mode, `--disable-cuda-graph`.
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
    """A forward pre-hook for the module `model`, which SGLang calls in each forward: it records while a
    profiler does. Between profiles it is one question a forward, and no hook is on a router.

        python -m sglang.launch_server --model-path MODEL --disable-cuda-graph --forward-hooks '[{"name":
            "moe_trace", "target_modules": ["model"], "hook_type": "forward_pre",
            "hook_factory": "moe_trace.integrations.sglang.hook:trace_while_profiled"}]'

    Then /start_profile and /stop_profile write traces with the routing in them. A model that holds no routers
    is warned of, once.

    Args:
        config: `MoETracer`'s keyword arguments, such as `{"routes": true}`.
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
            self._follow(module, profiled)
        except (MoETraceError, TypeError) as error:
            self._failed = True
            warnings.warn(f"the routing is not recorded: {error}", RuntimeWarning, stacklevel=2)

    def _follow(self, module: nn.Module, profiled: bool) -> None:
        if not self._ready:  # the first forward of all: kernels are compiled now, and not in a profile
            with MoETracer(module, **self._config):
                self._ready = True
        if not profiled and self._tracer is not None:
            self._tracer.stop()
            self._tracer = None
        elif profiled:
            self._tracer = MoETracer(module, **self._config)
            self._tracer.start()
