"""Entry point for vLLM's plugins (`vllm.general_plugins`), run in every process of an engine.

It wraps one method, `WorkerWrapperBase.init_device`, which runs once in each worker. Unless vLLM's torch
profiler or moe_trace's metrics are configured, it does nothing else.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from moe_trace.integrations.vllm.metrics_page import PATH, serve_metrics

SWITCH = "MOE_TRACE_VLLM"
"""Environment variable; `0` disables moe_trace in vLLM."""
_WORKERS, _WRAPPER, _METHOD = "vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_device"


def register() -> None:
    """Install the wrapper. vLLM calls this, in some processes more than once; it never raises."""
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "off", "no"):
        return
    try:
        wrapper: Any = getattr(importlib.import_module(_WORKERS), _WRAPPER)
        method = getattr(wrapper, _METHOD)
    except Exception as error:
        _warn(f"expected {_WORKERS}.{_WRAPPER}.{_METHOD}, found {error!r}")
        return
    if getattr(method, "_moe_trace", False):
        return
    if os.environ.get(PATH):
        _serve_metrics()

    @functools.wraps(method)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        _install_tracing(getattr(self, "worker", None), getattr(self, "vllm_config", None))
        return result

    init_device._moe_trace = True  # type: ignore[attr-defined]
    setattr(wrapper, _METHOD, init_device)


def unregister() -> None:
    """Undo `register`; workers created since then stay as they are."""
    wrapper: Any = getattr(importlib.import_module(_WORKERS), _WRAPPER)
    method = getattr(wrapper, _METHOD)
    if getattr(method, "_moe_trace", False):
        setattr(wrapper, _METHOD, method.__wrapped__)


def _install_tracing(worker: Any, config: Any) -> None:
    """Install tracing in a worker that has its device but no model yet."""
    try:
        profiler = getattr(getattr(config, "profiler_config", None), "profiler", None)
        if worker is None or (profiler != "torch" and not os.environ.get(PATH)):
            return
        from moe_trace.integrations.vllm.worker import WorkerTracing

        WorkerTracing(worker, config).install()
    except Exception as error:
        _warn(repr(error))


def _serve_metrics() -> None:
    """Serve metrics, as this may be the process that answers `/metrics`."""
    try:
        serve_metrics()
    except Exception as error:
        _warn(repr(error))


def _warn(problem: str) -> None:
    import logging

    logging.getLogger("vllm.moe_trace").warning(
        "moe_trace does not fit this vLLM, which runs on as without it: %s", problem
    )
