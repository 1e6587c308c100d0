"""Watch a user's program: calls of models with routers, optimizer steps, and starts of profilers.

Each model with routers gets a tracer at its first call, and every torch profiler that the program starts adds
the routing to its traces. If the program starts none, some of its steps are profiled.

A step begins with the first forward after an optimizer step, and contains its forwards, backwards and the
optimizer step. In a program without training, each forward of its first model is a step.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, schedule

from moe_trace.data.calls.table import CallTable
from moe_trace.data.errors import NoRoutersFound
from moe_trace.data.schema import Lost
from moe_trace.find.routers import find_routers
from moe_trace.integrations.handler import tensorboard_trace_handler
from moe_trace.record.sessions import listen, unlisten
from moe_trace.record.tracer import MoETracer
from moe_trace.workload.config import RunConfig, routes_of


class _Tracer(MoETracer):
    """Tracer that keeps a list of the traces its routing was added to."""

    traces: list[Path]

    def accept(self, placed: CallTable, lost: Lost, trace_path: str | Path) -> None:
        super().accept(placed, lost, trace_path)
        if len(placed) and (path := Path(os.path.abspath(trace_path))) not in self.traces:
            self.traces.append(path)


class Watch:
    """Tracer of a program's models, which also profiles some steps unless the program does so itself.

    Args:
        config: `steps` are profiled after `warmup` others, into `out`.
        worker: worker name in file names of traces; None for the default.
    """

    def __init__(self, config: RunConfig, worker: str | None = None) -> None:
        self.config, self._worker = config, worker
        self.step = -1
        """Index of the current step."""
        self.own_profiler = False
        """Whether the program started a profiler."""
        self.models: list[str] = []
        """Classes of the traced models."""
        self.traces: list[Path] = []
        """Traces with the routing, in the order in which they were written."""
        self._known: dict[int, bool] = {}
        """Whether forwards of a module are steps, by id of each module seen."""
        self._alive: dict[int, weakref.ref[nn.Module]] = {}
        self._routers = weakref.WeakSet[nn.Module]()
        self._tracers = weakref.WeakSet[_Tracer]()  # must not keep a model that the program drops alive
        self._counts: weakref.ref[nn.Module] | None = None
        self._by_optimizer = self._optimizer_stepped = False
        self._profiler: torch.profiler.profile | None = None
        self._finished = False
        """Whether our profile was written and the tracers were stopped."""
        self._pid = os.getpid()
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Watch all calls of modules, starts of profilers and steps of optimizers."""
        original = nn.Module.__call__

        @functools.wraps(original)
        def look_and_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if known.get(id(module), True):  # a global hook could not add hooks for this very call
                before(module)
            return original(module, *args, **kwargs)

        known, before = self._known, self._before_call
        nn.Module.__call__ = look_and_call  # type: ignore[method-assign]
        self._undo.append(lambda: setattr(nn.Module, "__call__", original))
        self._undo.append(register_optimizer_step_post_hook(self._after_optimizer).remove)
        listen(self._on_other_profiler)
        self._undo.append(lambda: unlisten(self._on_other_profiler))

    def finish(self) -> None:
        """Write what was recorded and undo all patches; do nothing in a forked process."""
        if os.getpid() == self._pid:
            self._safely(self._end_profile)
            for tracer in list(self._tracers):
                self._safely(tracer.stop)
            while self._undo:
                self._undo.pop()()

    def tracers(self) -> list[MoETracer]:
        """Return the tracers of models that are still alive."""
        return list(self._tracers)

    def _before_call(self, module: nn.Module) -> None:
        if id(module) not in self._known:
            self._safely(lambda: self._inspect(module))
        if self._known.get(id(module)) and os.getpid() == self._pid:
            self._safely(lambda: self._before_forward(module))

    def _inspect(self, module: nn.Module) -> None:
        self._remember(module.modules())
        if os.getpid() != self._pid:
            return
        try:
            routers = {site.router for site in find_routers(module)}
        except NoRoutersFound:
            return
        if routers <= set(self._routers):
            return
        tracer = _Tracer(
            module, layers=self.config.layers, every=self.config.every, routes=routes_of(self.config)
        )
        tracer.traces = self.traces
        self._routers.update(routers)
        self._tracers.add(tracer)
        self.models.append(type(module).__name__)
        if not self._finished or self.own_profiler:
            tracer.start()
        if self._counts is None or self._counts() is None:
            self._counts = weakref.ref(module)
            self._known[id(module)] = True

    def _remember(self, modules: Any) -> None:
        """Mark modules as seen, until they are deleted and their ids may be reused."""
        for module in modules:
            key = id(module)

            def forget(_: Any, key: int = key) -> None:
                self._known.pop(key, None)
                self._alive.pop(key, None)

            self._known[key] = False
            self._alive[key] = weakref.ref(module, forget)

    def _before_forward(self, module: nn.Module) -> None:
        if self.step < 0:
            self._by_optimizer = module.training and torch.is_grad_enabled() and _has_optimizer()
        elif self._by_optimizer and not self._optimizer_stepped:
            return
        self._optimizer_stepped = False
        self.step += 1
        if self.step == 0 and not self.own_profiler:
            self._start_profile(module)
        elif self._profiler is not None:
            self._profiler.step()
            if self.step == self.config.warmup + self.config.steps:
                self._end_profile()
                self._finished = True
                for tracer in list(self._tracers):
                    tracer.stop()

    def _after_optimizer(self, *_: Any) -> None:
        self._by_optimizer = self._optimizer_stepped = True

    def _start_profile(self, module: nn.Module) -> None:
        config = self.config
        on_gpu = torch.cuda.is_available() and any(p.is_cuda for p in module.parameters())
        with warnings.catch_warnings():  # a warning about the lack of warm-up if the first step is recorded
            warnings.simplefilter("ignore", UserWarning)
            steps = schedule(
                wait=max(0, config.warmup - 1), warmup=min(1, config.warmup), active=config.steps, repeat=1
            )
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=steps,
            record_shapes=config.record_shapes,
            with_stack=config.with_stack,
            on_trace_ready=tensorboard_trace_handler(config.out, self._worker, use_gzip=True),
        )
        self._profiler.start()

    def _end_profile(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _on_other_profiler(self, prof: Any) -> None:
        """Handle a profiler's start or step: two at once end the process, so ours gives way to another."""
        if prof is self._profiler or prof is getattr(self._profiler, "profiler", None):
            return
        if os.getpid() != self._pid or self.own_profiler:
            return
        self.own_profiler = True
        self._safely(self._end_profile)
        for tracer in list(self._tracers) if self._finished else ():
            self._safely(tracer.start)

    @staticmethod
    def _safely(action: Callable[[], None]) -> None:
        """Keep the program running if we fail."""
        try:
            action()
        except Exception as error:
            print(f"moe-trace: {error}", file=sys.stderr)


def _has_optimizer() -> bool:
    return any(issubclass(type(item), Optimizer) for item in gc.get_objects())
