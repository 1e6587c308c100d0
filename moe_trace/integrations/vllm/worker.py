"""Tracing in a vLLM worker whose torch profiler or metrics are configured.

Methods of the worker object itself are wrapped, never those of vLLM's classes. While its profiler records,
the routers are hooked, and the profiler's trace gets the routing. A model that will be compiled or captured
into graphs is hooked permanently: vLLM drops the guards of compiled code, which looks up its hooks and fails
without them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from moe_trace.data.errors import NoRoutersFound
from moe_trace.data.version import __version__
from moe_trace.find.contracts.engines.vllm import remove_taps
from moe_trace.integrations.vllm.metrics import MetricsWriter, every, start_metrics, wanted
from moe_trace.integrations.vllm.tokens import StepTokens, tell_tokens
from moe_trace.record.tracer import MoETracer

logger = logging.getLogger("vllm.moe_trace")  # a child of vLLM's logger, which prints its messages

_AOT = "VLLM_USE_AOT_COMPILE"
"""Enables vLLM's cache of whole programs. A cached program was not traced, so it contains no hooks."""


class WorkerTracing:
    """Records the routing of one worker.

    Args:
        worker: vLLM's worker, before its model is loaded.
        config: its `VllmConfig`.
    """

    def __init__(self, worker: Any, config: Any) -> None:
        self.worker, self.config = worker, config
        self.tracer: MoETracer | None = None
        self.tokens: StepTokens | None = None
        self.compiles = compiles(config)
        """Whether the model is compiled or captured into graphs."""
        self.metrics: MetricsWriter | None = None
        self.stays = self.compiles or wanted()
        """Whether the routers stay hooked from start to end."""
        self._failed = False
        self._followed_profiler: Any = None

    def install(self) -> None:
        """Wrap the methods of the worker that determine when to record."""
        worker = self.worker
        if self.compiles:
            keep_caches_apart(self.config)
        if self.stays:
            _wrap(worker, "load_model", after=self._catching_errors(self.begin))
        if wanted():
            self._measure(worker)
        profile = worker.profile

        @functools.wraps(profile)
        def start_or_stop(is_start: bool = True, *args: Any, **kwargs: Any) -> Any:
            if is_start:
                self._catching_errors(self._profile_starts)(kwargs.get("delay_iterations"))
            try:
                return profile(is_start, *args, **kwargs)
            finally:
                self._catching_errors(self._profile_started if is_start else self.end)()

        worker.profile = start_or_stop

    def _measure(self, worker: Any) -> None:
        """Wrap the methods that separate the engine's steps from its runs of random tokens."""

        def when_idle(name: str) -> Callable[..., None]:
            def call() -> None:
                if self.metrics is not None and not self._is_profiling:
                    getattr(self.metrics, name)()

            return self._catching_errors(call)

        _wrap(worker, "compile_or_warm_up_model", after=when_idle("forget"))
        _wrap(worker, "execute_dummy_batch", before=when_idle("keep"), after=when_idle("forget"))
        _wrap(worker, "execute_model", after=when_idle("step"))
        _wrap(worker, "shutdown", before=when_idle("close"))

    @property
    def _is_profiling(self) -> bool:
        """Whether recorded calls are needed for a trace first."""
        return bool(getattr(getattr(self.worker, "profiler", None), "is_running", False))

    # -- when to record ---------------------------------------------------------------------------------

    def _profile_starts(self, delay: int | None) -> None:
        """Begin recording at once, unless vLLM's profiler starts after some steps and will trigger it."""
        if delay is None:
            delay = getattr(self.config.profiler_config, "delay_iterations", 0)
        if self._followed_profiler is None and not delay:
            self.begin()

    def _profile_started(self) -> None:
        profiler = getattr(self.worker, "profiler", None)
        if profiler is not None and profiler is not self._followed_profiler:
            self._followed_profiler = profiler
            _wrap(profiler, "_start", before=self._catching_errors(self.begin))
            _wrap(profiler, "_stop", after=self._catching_errors(self.end))
        if not getattr(profiler, "is_running", True):  # failed to start, or is delayed
            self.end()

    def begin(self) -> None:
        """Hook the routers; every torch profiler that records from now on has the routing in its trace."""
        if self.tracer is None:
            configured = getattr(getattr(self.config, "profiler_config", None), "profiler", None)
            tracer = MoETracer(self.worker.get_model(), every=every() if configured is None else 1)
            self.tokens = tell_tokens(tracer, self.worker)
            tracer.start()
            self.tracer = tracer
            self.metrics = start_metrics(tracer)
            logger.info("moe_trace records the routing of %d MoE layers", len(tracer.sites))

    def end(self) -> None:
        """Remove everything but hooks in compiled code, once profiling is over and the trace is written."""
        tracer = self.tracer
        if tracer is None:
            return
        profiler = getattr(getattr(self.worker, "profiler", None), "profiler", None)
        if profiler is not None:
            tracer.detach(profiler)
        if not self.stays:
            self.tracer = None
            if self.tokens is not None:
                self.tokens.leave()
            tracer.stop()
            remove_taps(self.worker.get_model())

    # -- errors are not raised into vLLM ----------------------------------------------------------------

    def _catching_errors(self, function: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if self._failed:
                return
            try:
                function(*args)
            except NoRoutersFound:
                self._failed = True
                logger.info("moe_trace found no MoE layers that it can read: vLLM's traces stay as they are")
            except Exception as error:
                self._failed = True
                logger.warning(
                    "moe_trace adds no routing to vLLM's traces from now on; vLLM runs on: %r", error
                )

        return call


def _wrap(
    owner: Any,
    name: str,
    *,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Make an object's method call functions before or after itself, whether it raises or not."""
    method = getattr(owner, name, None)
    if method is None:
        return

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        try:
            return method(*args, **kwargs)
        finally:
            if after is not None:
                after()

    setattr(owner, name, call)


def compiles(config: Any) -> bool:
    """Return whether a `VllmConfig` has the model compiled or captured into graphs."""
    compilation = getattr(config, "compilation_config", None)
    modes = (getattr(compilation, name, None) for name in ("mode", "cudagraph_mode"))
    return any(mode is not None and getattr(mode, "name", str(mode)) != "NONE" for mode in modes)


def keep_caches_apart(config: Any) -> None:
    """Keep code compiled with hooks from being used without them, and the reverse."""
    os.environ[_AOT] = "0"
    if isinstance(getattr(config, "additional_config", None), dict):  # part of vLLM's cache key
        config.additional_config["moe_trace"] = f"routing and phases, {__version__}"
    else:
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
