"""`moe_trace.profile`: `torch.profiler.profile` with a model's routing in every trace it writes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from moe_trace.data.routes.options import Routes
from moe_trace.find.routers import LayerSelector
from moe_trace.record.attach import attached_tracers as attached_tracers
from moe_trace.record.calls.recorder import DEFAULT_CAPACITY_BYTES
from moe_trace.record.tracer import MoETracer
from moe_trace.timeline.counter_tracks import Tracks


class profile(torch.profiler.profile):
    """Drop-in replacement for `torch.profiler.profile` that also records the routing of `model`.

    Args:
        model: module that contains the routers.
        layers, every, warmup, capacity, capacity_bytes, tracks, routes: see `MoETracer`.
        profiler_arguments: all arguments of `torch.profiler.profile`, passed on unchanged.

    `tracer` is the `MoETracer`; `tracer.summary()` and `tracer.samples()` return the metrics.

    Raises:
        NoRoutersFound: the model has no router that a known contract reads.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerSelector = None,
        every: int = 1,
        warmup: int = 0,
        capacity: int = 100_000,
        capacity_bytes: int = DEFAULT_CAPACITY_BYTES,
        tracks: Tracks = ("band",),
        routes: bool | Routes = False,
        **profiler_arguments: Any,
    ) -> None:
        super().__init__(**profiler_arguments)
        self.tracer = MoETracer(
            model,
            layers=layers,
            every=every,
            warmup=warmup,
            capacity=capacity,
            capacity_bytes=capacity_bytes,
            tracks=tracks,
            auto_attach=False,
            routes=routes,
        )
        self.tracer.attach(self)

    def start(self) -> None:
        """Install the hooks and start profiling."""
        self.tracer.start()
        try:
            super().start()
        except BaseException:
            self.tracer.stop()
            raise

    def stop(self) -> None:
        """Stop profiling, which calls `on_trace_ready`, and remove the hooks."""
        try:
            super().stop()
        finally:
            self.tracer.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.tracer.abandon_calls()
        super().__exit__(kind, error, trace)
