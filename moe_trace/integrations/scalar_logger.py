"""Routing metrics as TensorBoard scalars during a whole training run, without a profiler."""

from __future__ import annotations

import os
import queue
import threading
import time
import warnings
from itertools import chain
from types import TracebackType
from typing import Any

from moe_trace.data.schema import RoutingSample
from moe_trace.integrations.scalars import add_scalars, load_writer
from moe_trace.record.tracer import MoETracer

_MAX_QUEUED = 4  # hand-overs queued for the writer at most
# Steps of this period are written together: most of the writer's work is independent of their number, and
# while it holds the GIL, the training thread launches nothing.
_PERIOD_S = 2.0
_STEPS_MAX = 32  # ... up to this many steps, of some KB per router each


class ScalarLogger:
    """Write load, entropy and auxiliary loss of every recorded step, from a separate thread.

        with MoETracer(model, every=100) as tracer, ScalarLogger(tracer, "runs/moe") as logger:
            for batch in batches:
                ...                 # forward, backward, optimizer
                logger.step()       # instead of tracer.step()

    In recorded steps only, `step` costs the training thread one batch of kernels and one asynchronous copy;
    it never blocks. The steps of 2 seconds, or 32 steps, are written together. Written samples are discarded,
    so memory use does not grow with the length of the run.

    Args:
        tracer: its `every` and `warmup` determine which steps are recorded.
        folder: TensorBoard's log folder; created if missing.
    """

    def __init__(self, tracer: MoETracer, folder: str | os.PathLike[str]) -> None:
        self.steps_dropped = 0
        """Steps omitted because the writer could not keep up."""
        self._tracer = tracer
        self._folder = os.fspath(folder)
        self._make_writer = load_writer()
        self._queue: queue.Queue[Any] = queue.Queue(_MAX_QUEUED)
        self._error: BaseException | None = None
        self._held: list[RoutingSample] = []
        self._steps: list[list[Any]] = []
        """Batches recorded since the last hand-over to the writer, by step."""
        self._last_flush = time.monotonic()
        self._writer = threading.Thread(target=self._write_all, name="moe_trace scalars", daemon=True)
        tracer.count_steps_by_hand()
        self._writer.start()

    def step(self) -> None:
        """End a step and pass recorded steps to the writer when they are due."""
        recorded = self._tracer.samples_this_step()
        self._tracer.step()
        if recorded:
            self._steps.append(self._tracer.take_batches())
        now = time.monotonic()
        if self._steps and (len(self._steps) >= _STEPS_MAX or now - self._last_flush >= _PERIOD_S):
            steps, self._steps, self._last_flush = self._steps, [], now
            try:
                self._queue.put_nowait(steps)
            except queue.Full:
                self.steps_dropped += len(steps)

    def close(self) -> None:
        """Write the remaining steps and end the thread. Warns if something could not be written."""
        if not self._writer.is_alive():
            return
        batches = self._tracer.take_batches()
        self._queue.put([*self._steps, batches] if batches else self._steps)
        self._queue.put(None)
        self._writer.join()
        if self._error is not None:
            warnings.warn(
                f"scalars in {self._folder} are incomplete: {self._error}", RuntimeWarning, stacklevel=2
            )
        if self.steps_dropped:
            warnings.warn(
                f"{self.steps_dropped} steps were left out of {self._folder}: the writer could not keep up; "
                "raise every=",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> ScalarLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_all(self) -> None:
        """Run the writer's thread: wait for each copy, then write. A failure must not stop the training."""
        try:
            with self._make_writer(log_dir=self._folder) as writer:
                while (steps := self._queue.get()) is not None:
                    self._held += self._tracer.samples_of(list(chain.from_iterable(steps)))
                    self._write(writer, last_step=False)
                self._write(writer, last_step=True)
        except Exception as error:
            self._error = error
            while (steps := self._queue.get()) is not None:
                self.steps_dropped += len(steps)

    def _write(self, writer: Any, *, last_step: bool) -> None:
        """Write every complete step; a step is complete once a later one has begun."""
        newest = max((sample.step for sample in self._held), default=0)
        complete = [sample for sample in self._held if last_step or sample.step < newest]
        self._held = [sample for sample in self._held if not last_step and sample.step >= newest]
        add_scalars(writer, complete)
