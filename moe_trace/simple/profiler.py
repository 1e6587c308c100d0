"""`MoEProfiler`: start, run the model, stop, read the metrics. No torch profiler is needed."""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from moe_trace.data.data_frame import data_frame
from moe_trace.data.errors import NothingRecorded, UsageError, deprecated
from moe_trace.data.files import write_text
from moe_trace.data.routes.options import Routes
from moe_trace.data.schema import RoutingSample
from moe_trace.find.routers import LayerSelector
from moe_trace.record.device_clock import CallTimes, DeviceClock
from moe_trace.record.tracer import MoETracer
from moe_trace.simple.metrics import (
    COLUMNS,
    NAN,
    CallRow,
    RouterMetrics,
    call_row,
    render_metrics,
    rows_to_csv,
)

__all__ = ["MoEProfiler", "RouterMetrics"]


class MoEProfiler:
    """Record what every router of a model decides between `start()` and `stop()`.

    Hooks are on the model only in between, and its results are bitwise the same with them. The device is not
    synchronized until results are requested. A step is one forward of `model` (so one generated token is one
    step), or, once `step()` has been called, ends with each call of it.

    Args:
        model: any module that contains Mixture-of-Experts routers.
        layers: routers to record: layer indices, labels, module paths, or a predicate; None selects all.
        warmup: number of steps to skip at the start.
        every: record every n-th step after that.
        capacity: number of router calls kept; beyond it the oldest are dropped, and the summary reports it.
        routes: also record which token went to which expert, for `tracer.routes()`; see `MoETracer`.
        warmup_steps: older name of `warmup`.
        sampling_rate: older name of `every`.

    Raises:
        NoRoutersFound: the model contains no router that a known contract can read.
        UsageError: arguments are out of range, or `layers` selects nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerSelector = None,
        warmup: int = 0,
        every: int = 1,
        capacity: int = 100_000,
        routes: bool | Routes = False,
        warmup_steps: int | None = None,
        sampling_rate: int | None = None,
    ) -> None:
        if warmup_steps is not None:
            deprecated("warmup_steps=", "warmup=")
            warmup = warmup_steps
        if sampling_rate is not None:
            deprecated("sampling_rate=", "every=")
            every = sampling_rate
        _require_count("warmup", warmup, least=0)
        _require_count("every", every, least=1)
        self._clock = DeviceClock(capacity=capacity)
        self.tracer = MoETracer(
            model,
            layers=layers,
            every=every,
            warmup=warmup,
            capacity=capacity,
            clock=self._clock,
            routes=routes,
        )
        """The underlying `MoETracer`."""
        self._devices = {site.name: _device_of(site.router) for site in self.tracer.sites}
        self._remover: weakref.finalize[..., MoEProfiler] | None = None
        self._ever_started = False

    # -- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Add the hooks. A second measurement adds to the first; a running one continues, with a warning."""
        if self._remover is not None:
            warnings.warn(
                "MoEProfiler.start() was called while it was running: the measurement goes on. "
                "Call stop() first, and make a new MoEProfiler to begin from zero",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.tracer.start()
        # A profiler dropped without stop(), as when a notebook cell is run again, removes its hooks.
        self._remover = weakref.finalize(self, self.tracer.stop)
        self._remover.atexit = False
        self._ever_started = True

    def stop(self) -> None:
        """Remove the hooks; warn if nothing was recorded. Stopping a second time has no effect."""
        if self._remover is None:
            if not self._ever_started:
                warnings.warn(
                    "MoEProfiler.stop() was called without start(): nothing was measured",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        self._remover()
        self._remover = None
        problem = self._nothing_recorded()
        if problem is not None:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> MoEProfiler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.tracer.abandon_calls()
        self.stop()

    def step(self) -> None:
        """End a step explicitly; from the first call on, forwards no longer count as steps."""
        self.tracer.step()

    # -- results --------------------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, RouterMetrics]:
        """Return a mapping from router's module path to its metrics, in layer order. Waits for the device."""
        by_router: dict[str, list[RoutingSample]] = {site.name: [] for site in self.tracer.sites}
        for sample in self.tracer.samples():
            by_router[sample.name].append(sample)
        times = self._clock.read()
        return {
            site.name: RouterMetrics(
                site.info,
                tuple(by_router[site.name]),
                tuple(self._row(s, times.get((s.name, s.call))) for s in by_router[site.name]),
            )
            for site in self.tracer.sites
        }

    def rows(self) -> list[CallRow]:
        """Return one row per call and layer, in chronological order."""
        rows = [row for metrics in self.get_metrics().values() for row in metrics.rows]
        return sorted(rows, key=lambda row: row.timestamp)

    def to_df(self) -> Any:
        """Return the rows as a `pandas.DataFrame`; `attrs["columns"]` describes the columns.

        Raises:
            MissingPackage: pandas is not installed; `rows` and `save_csv` do not need it.
        """
        return data_frame(self.rows(), COLUMNS)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV, atomically, replacing an existing file. Does not need pandas.

        Raises:
            NothingRecorded: there are no rows; the message says why and what to change.
            OutputError: the file cannot be written.
        """
        rows = self.rows()
        if not rows:
            raise NothingRecorded(f"{os.fspath(path)} was not written: {self._nothing_recorded()}")
        write_text(Path(path), rows_to_csv(rows))

    def print_summary(self) -> None:
        """Print a line per layer or, if nothing was recorded, the reason and what to change."""
        print(render_metrics(type(self.tracer.model).__name__, self.get_metrics(), self.notes()), end="")

    def notes(self) -> list[str]:
        """Return notes on how far to trust the metrics; empty if there are none."""
        problem = self._nothing_recorded()
        return [problem] if problem is not None else list(self.tracer.summary().notes)

    def _row(self, sample: RoutingSample, times: CallTimes | None) -> CallRow:
        on_device = times is not None and times.clock == "cuda_event"
        router_ms = times.router_ms if on_device and times is not None else _host_us(sample) / 1000
        return call_row(
            sample,
            device=times.device if times is not None else self._devices[sample.name],
            clock="cuda_event" if on_device else "host",
            latency_ms=NAN if router_ms is None else router_ms,
            experts_ms=NAN if times is None or times.experts_ms is None else times.experts_ms,
        )

    def _nothing_recorded(self) -> str | None:
        """Return why no router call was recorded and what to change, or None if any was."""
        tracer = self.tracer
        if any(tracer.calls_by_router().values()):
            return None
        found = f"found {len(tracer.sites)} routers in {type(tracer.model).__name__}, but recorded no call"
        misread = tracer.recording().lost.misread
        if not self._ever_started:
            return f"{found}: start() was never called; call it before running the model"
        if misread:
            return f"{found}: a router could not be read ({next(iter(misread.values()))})"
        if tracer.forwards_seen == 0:
            return (
                f"{found}: the model was not run between start() and stop(); run the very object that was "
                "given to MoEProfiler"
            )
        if tracer.forwards_recorded == 0:
            return (
                f"{found}: warmup={tracer.warmup} and every={tracer.every} left out all of "
                f"the {tracer.forwards_seen} forwards; lower them, or run more steps"
            )
        return (
            f"{found} in {tracer.forwards_recorded} forwards: no router module was called. The layers did "
            "not run, a fused kernel or torch.compile went past them (start before compiling), or layers= "
            "chose others"
        )


def _device_of(router: nn.Module) -> str:
    parameter = next(router.parameters(), None)
    return str(parameter.device) if parameter is not None else "cpu"


def _require_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        advice = "; to record a tenth of the steps, give 10" if name == "every" else ""
        raise UsageError(f"expected {name} to be a whole number of at least {least}, found {value!r}{advice}")


def _host_us(sample: RoutingSample) -> float:
    """Return the host time of a router call: its range in the trace, or the time between its hooks."""
    if sample.placement is not None and "router" in sample.placement.host:
        return sample.placement.host["router"].duration_us
    return (sample.host_end_ns - sample.host_start_ns) / 1000
