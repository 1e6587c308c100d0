"""`MoETraceCallback`: routing metrics in the logs of transformers' `Trainer`, and traces on a schedule."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.profiler import ProfilerAction
from torch.profiler import schedule as make_schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_trace.data.routes.options import Routes
from moe_trace.data.schema import RoutingSample
from moe_trace.find.routers import LayerSelector
from moe_trace.integrations.handler import tensorboard_trace_handler
from moe_trace.integrations.scalars import scalar_points
from moe_trace.record.profiler import profile
from moe_trace.record.tracer import MoETracer

Schedule = Callable[[int], ProfilerAction]


class MoETraceCallback(TrainerCallback):
    """Add routing metrics to the Trainer's logs, and write merged traces of some steps.

        callback = MoETraceCallback("runs/moe")
        callback.add_to(trainer)
        trainer.train()

    Every training log gets `moe_load_max_over_mean`, `moe_load_cv`, `moe_router_entropy` (nats),
    `moe_router_confidence` and `moe_skipped_share`: means over the layers and over the steps since the
    previous log. Forwards of an evaluation do not count. In a distributed run they are those of the logging
    rank.

    Scalars written with a trace use the Trainer's step numbers, from 1; in the trace itself the profiler
    counts from 0.

    `add_to` puts the callback before the Trainer's reporters, so that TensorBoard and others receive the
    metrics. Passed as `Trainer(callbacks=[callback])` it runs after them: the metrics are then in
    `trainer.state.log_history` and in the printed log, but not in the reporters' output.

    Args:
        folder: output folder for traces and their TensorBoard scalars; None writes no trace.
        schedule: which training steps to trace, as for `torch.profiler.profile`; by default one step of wait,
            one of warm-up, three traced, once.
        layers: which routers; see `MoETracer`.
        every: record the routing of every n-th step.
        per_layer: also log each layer, as `moe_load_max_over_mean/L03`.
        capacity: maximum number of router calls kept; the oldest are dropped beyond it.
        routes: also record which token went to which expert, for `tracer.routes()`; see `MoETracer`.
        profiler_arguments: further arguments of `torch.profiler.profile`.

    The Trainer does not notify its callbacks of an exception, which leaves the profiler running: call
    `close()`, or use the callback as a context manager around `trainer.train()`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        schedule: Schedule | None = None,
        layers: LayerSelector = None,
        every: int = 1,
        per_layer: bool = False,
        capacity: int = 20_000,
        routes: bool | Routes = False,
        **profiler_arguments: Any,
    ) -> None:
        self.folder = folder
        self.per_layer = per_layer
        self.tracer: MoETracer | None = None
        """Tracer of the current or most recent training."""
        self._schedule = schedule or make_schedule(wait=1, warmup=1, active=3, repeat=1)
        self._recording: dict[str, Any] = {"layers": layers, "every": every, "capacity": capacity}
        self._recording["routes"] = routes
        self._profiler_arguments = profiler_arguments
        self._running: profile | MoETracer | None = None
        self._logged_until = 0

    def add_to(self, trainer: Any) -> MoETraceCallback:
        """Insert the callback before the trainer's other callbacks."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return self

    def close(self) -> None:
        """Stop recording and remove the hooks; idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()

    def __enter__(self) -> MoETraceCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.tracer is not None:
            self.tracer.abandon_calls()
        self.close()

    # -- the Trainer's events -------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hooks on the model being trained."""
        self.close()
        self._logged_until = 0
        model: nn.Module = kwargs["model"]
        started: profile | MoETracer
        if self.folder is None:
            started = self.tracer = MoETracer(model, **self._recording)
            self.tracer.count_steps_by_hand()  # gradient accumulation runs several forwards per step
        else:
            started = profile(
                model,
                **self._recording,
                schedule=self._schedule,
                # The Trainer counts from 1, or from where it resumed; the logs and the scalars of a step must
                # have the same number.
                on_trace_ready=tensorboard_trace_handler(self.folder, first_step=state.global_step + 1),
                **self._profiler_arguments,
            )
            self.tracer = started.tracer
        started.start()
        self._running = started

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count one optimizer step as one step, however many forwards it took."""
        if self._running is not None:
            self._running.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the metrics of the steps since the previous log."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs or self._running is None or self.tracer is None:
            return
        new = [s for s in self.tracer.samples(since_step=self._logged_until) if s.stage == "train"]
        if not new:
            return
        self._logged_until = max(s.step for s in new) + 1
        figures = _means(new, per_layer=self.per_layer)
        logs.update(figures)
        if state.log_history:  # the Trainer stores a copy before calling its callbacks
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks; a trace in progress is written."""
        self.close()
        if self.tracer is not None and not any(self.tracer.calls_by_router().values()):
            warnings.warn(
                f"MoETraceCallback recorded no call of the {len(self.tracer.sites)} routers in "
                f"{self.tracer.forwards_seen} forwards: every={self.tracer.every} left them out, or the MoE "
                "layers did not run through their modules",
                RuntimeWarning,
                stacklevel=2,
            )


def _means(samples: Sequence[RoutingSample], *, per_layer: bool) -> dict[str, float]:
    """Return the mean over the steps, by name in the logs."""
    values: dict[str, list[float]] = defaultdict(list)
    for tag, value, _ in scalar_points(samples):
        figure, layer = tag.split("/", 1)
        if layer == "mean":
            values[figure].append(value)
        elif per_layer:
            values[tag].append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
