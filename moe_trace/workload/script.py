"""A program of the user's, run as `python` runs it, with the first MoE model that it calls recorded.

The model is the outermost module with routers that is called first. Each of its forwards is a step, from
its beginning to that of the next: a training step with its backward and optimizer, or one generated token.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from moe_trace.data.errors import Interrupted, NoRoutersFound, NothingRecorded, UsageError
from moe_trace.find.routers import find_routers
from moe_trace.integrations.handler import tensorboard_trace_handler
from moe_trace.record.profiler import profile
from moe_trace.workload.config import RunConfig
from moe_trace.workload.folder import claim_folder, files_in, traces_in
from moe_trace.workload.runner import RunResult


def run_script(script: Path, arguments: Sequence[str], config: RunConfig) -> tuple[RunResult, int]:
    """Run the program to its end; returns what was recorded, and the exit status that it ended with.

    Args:
        config: `steps` forwards are recorded after `warmup` others; `layers`, `every` and the profiler's
            options are as for a model that moe_trace runs.

    Raises:
        UsageError: there is no such file.
        NothingRecorded: it called no model with routers, or not often enough.
        Interrupted: Ctrl-C; what was recorded is kept.
    """
    if not script.is_file():
        raise UsageError(f"found no file {script}, expected a Python program")
    earlier = claim_folder(config.out, force=config.force)
    recording = _Recording(config)
    try:
        with (
            _ahead_of(nn.Module, "__call__", recording.before_call),
            _ahead_of(torch.profiler.profile, "start", recording.before_profiler),
            _ahead_of(torch.autograd.profiler.profile, "__enter__", recording.before_profiler),
            _as_main(script, arguments),
        ):
            status = _status_of(script)
    finally:
        recording.stop()
    written = [file for file in traces_in(config.out) if file not in earlier]
    if not written:
        raise NothingRecorded(recording.why_nothing(script))
    for file in earlier:
        file.unlink(missing_ok=True)
    if status == Interrupted.exit_code:
        kept = f"what was recorded is kept in {written[-1]}"
        raise Interrupted(f"interrupted after {recording.forwards} forwards; {kept}")
    from moe_trace.read.reader import read_summary

    return RunResult(read_summary(written[-1]), written[-1], files_in(config.out)), status


def _status_of(script: Path) -> int:
    """Run it, and return the status that Python would end with."""
    try:
        runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


class _Recording:
    """Waits for a model with routers, and records some of its forwards."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model: nn.Module | None = None
        self.forwards = 0
        """Begun by the model."""
        self._profiler: profile | None = None
        self._gave_way = False
        """To a profiler of the program's own: a process has one at a time."""
        self._dense: WeakSet[nn.Module] = WeakSet()
        """Modules that were looked at and hold no router."""

    def before_call(self, module: nn.Module) -> None:
        """Any module is about to be called."""
        if self.model is None and module not in self._dense:
            self._look_at(module)
        if module is self.model:
            self._before_forward()

    def _look_at(self, module: nn.Module) -> None:
        try:
            find_routers(module)
        except NoRoutersFound:
            self._dense.update(module.modules())
        else:
            self.model = module

    def _before_forward(self) -> None:
        recorded = self.forwards - self.config.warmup
        if self._gave_way:
            return
        if recorded == 0:
            self._start()
        elif recorded == self.config.steps:
            self.stop()
        elif self._profiler is not None:
            self._profiler.step()
        self.forwards += 1

    def before_profiler(self, profiler: Any) -> None:
        """A profiler is about to start: two at once end the process."""
        if profiler is self._profiler or self._gave_way:
            return
        self._gave_way = True
        print(f"moe-trace: {self._why_gave_way()}", file=sys.stderr)
        self.stop()

    def _why_gave_way(self) -> str:
        recorded = max(0, self.forwards - self.config.warmup)
        return (
            "the program starts a profiler of its own, and only one can record: recording ended after "
            f"{recorded} forwards; use moe_trace.profile in the program in place of it"
        )

    def _start(self) -> None:
        config = self.config
        assert self.model is not None
        on_gpu = torch.cuda.is_available() and any(p.is_cuda for p in self.model.parameters())
        self._profiler = profile(
            self.model,
            layers=config.layers,
            every=config.every,
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            record_shapes=config.record_shapes,
            with_stack=config.with_stack,
            on_trace_ready=tensorboard_trace_handler(config.out, use_gzip=True),
        )
        self._profiler.start()

    def stop(self) -> None:
        """Write what was recorded; once is enough."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def why_nothing(self, script: Path) -> str:
        """Why there is no trace."""
        if self._gave_way:
            return self._why_gave_way()
        if self.model is None:
            return f"{script} called no model with MoE routers; `moe-trace routers` says what would be found"
        return (
            f"{script} ran {self.forwards} forwards of {type(self.model).__name__}, and --warmup "
            f"{self.config.warmup} left them out; lower it"
        )


@contextmanager
def _ahead_of(owner: type, name: str, before: Callable[[Any], None]) -> Iterator[None]:
    """Call `before(self)` ahead of each call of a method: hooks put on a module there still see that call."""
    original = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        return original(self, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """`sys.argv` and the first entry of `sys.path` as `python script.py` has them."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
