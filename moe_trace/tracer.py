"""`MoETracer`: hooks on a model's routers while it is active, and what they recorded."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_trace.environment import describe_model, rank_and_world_size, versions
from moe_trace.errors import MoETraceError, UsageError
from moe_trace.hooks import CallClock, ForwardContext, Level, SiteHooks
from moe_trace.ranges import OpenRanges, profiler_is_recording
from moe_trace.recorder import Recorder
from moe_trace.routers import LayerSelector, RouterSite, find_routers
from moe_trace.schema import Lost, Placement, Recording, RoutingSample, Stage
from moe_trace.summary import Summary, summarize
from moe_trace.timeline.band import Tracks
from moe_trace.timeline.merge import Merged, merge_recording


class MoETracer:
    """Record what every router of a model decides, while active as a context manager.

    Args:
        model: any module that holds Mixture-of-Experts routers, wrappers included.
        layers: which routers: layer indices, labels, module paths, or a predicate on `RouterSite`.
        every: record every n-th step.
        warmup: steps to leave out at the start.
        capacity: router calls kept; beyond it the oldest are dropped and counted.
        tracks: counter tracks of the trace: the compact band, per layer, per expert.
        clock: times each router and its experts by another clock too, such as `DeviceClock`.

    A step is a profiler step where a profiler is attached (`prof.step()`). Without one, a step is one
    forward of `model`, until `step()` is called; from then on steps are counted by `step()` alone.

    Raises:
        NoRoutersFound: the model holds no router that a known contract reads.
        UsageError: arguments out of range, or `layers` selects nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerSelector = None,
        every: int = 1,
        warmup: int = 0,
        capacity: int = 100_000,
        tracks: Tracks = ("band",),
        clock: CallClock | None = None,
    ) -> None:
        if every < 1 or warmup < 0 or capacity < 1:
            raise UsageError(
                f"expected every >= 1, warmup >= 0 and capacity >= 1, "
                f"found every={every}, warmup={warmup}, capacity={capacity}"
            )
        self.model = model
        self.sites: list[RouterSite] = find_routers(model, layers=layers)
        self.every, self.warmup, self.tracks = every, warmup, tracks
        self.forwards_seen = 0
        self.forwards_recorded = 0
        self._recorder = Recorder(capacity=capacity)
        self._ranges = OpenRanges()
        self._hooks = [
            SiteHooks(
                site,
                recorder=self._recorder,
                ranges=self._ranges,
                context=self._current_context,
                owner=self,
                clock=clock,
            )
            for site in self.sites
        ]
        self._model_handles: list[RemovableHandle] = []
        self._contexts: dict[int, ForwardContext] = {}
        self._parameters = _forward_parameter_names(model)
        self._profiler: Any = None
        self._explicit_step: int | None = None
        self._next_forward = 0
        self._active = False
        self._placements: dict[tuple[str, int], Placement] = {}
        self._lost = Lost()
        self.exported_samples: list[RoutingSample] = []
        """The samples of the trace that was exported last."""
        self._description = describe_model(model, self.sites)
        self._options = {
            "layers": _describe_layers(layers),
            "every": every,
            "warmup": warmup,
            "capacity": capacity,
        }

    # -- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the hooks on. Samples of earlier activations are kept."""
        if self._active:
            raise MoETraceError("this MoETracer is already active; leave it before entering it again")
        self._active = True
        self._model_handles = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after_model, always_call=True),
        ]
        # The model's own hook lowers this at its next forward; a caller of a submodule never gets there.
        self._set_level(Level.RANGES if self._samples_step(self._step()) else Level.OFF)

    def stop(self) -> None:
        """Take the hooks off and close every range; what was recorded is kept."""
        for handle in self._model_handles:
            handle.remove()
        self._model_handles = []
        self._set_level(Level.OFF)
        for hooks in self._hooks:
            hooks.finish()
        self._ranges.close_all()
        self._contexts.clear()
        self._recorder.reduce()
        self._active = False

    def __enter__(self) -> MoETracer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon_calls()
        self.stop()

    def step(self) -> None:
        """End a step, where no attached profiler counts them."""
        self._explicit_step = self._step() + 1 if self._explicit_step is not None else 1

    def count_steps_by_hand(self) -> None:
        """From now on a step ends with `step()` only; for steps of several forwards from the first one on."""
        self._explicit_step = self._step()

    def attach(self, prof: Any) -> None:
        """Merge the routing into whatever `prof.export_chrome_trace` writes, and count its steps.

        Args:
            prof: a `torch.profiler.profile` (or another object with `export_chrome_trace(path, ...)`).
        """
        from moe_trace.profiler import attach_tracer

        self._profiler = prof
        attach_tracer(prof, self)

    # -- results --------------------------------------------------------------------------------------

    def samples(self) -> list[RoutingSample]:
        """One sample per recorded router call, in order of time. Waits for the device."""
        placements = self._placements
        return [
            replace(s, placement=placements[s.name, s.call]) if (s.name, s.call) in placements else s
            for s in self._recorder.drain()
        ]

    def recording(self) -> Recording:
        """Everything recorded, with the model's description and what was lost."""
        rank, world_size = rank_and_world_size()
        return Recording(
            model=self._description,
            options=self._options,
            routers=tuple(hooks.info for hooks in self._hooks),
            samples=tuple(self.samples()),
            lost=self._losses(),
            rank=rank,
            world_size=world_size,
            versions=versions(),
        )

    def summary(self) -> Summary:
        """The figures per router; latencies come from the trace where it has been written, else the clock."""
        return summarize(self.recording())

    def merge_into(self, trace_path: str | Path) -> None:
        """Merge what was recorded into a trace on disk; fits torchtitan's `trace_post_processor`."""
        self.accept(merge_recording(Path(trace_path), [self.recording()], tracks=self.tracks))

    def accept(self, merged: Merged) -> None:
        """Remember where the samples were placed and what the trace lacked."""
        names = {site.name for site in self.sites}
        self.exported_samples = [sample for sample in merged.placed if sample.name in names]
        for sample in self.exported_samples:
            if sample.placement is not None:
                self._placements[sample.name, sample.call] = sample.placement
        self._lost = replace(
            self._lost,
            samples_without_range=self._lost.samples_without_range + merged.lost.samples_without_range,
            ranges_without_sample=self._lost.ranges_without_sample + merged.lost.ranges_without_sample,
        )

    def calls_by_router(self) -> dict[str, int]:
        """Recorded calls by module path of the router."""
        return {hooks.site.name: hooks.calls for hooks in self._hooks}

    def abandon_calls(self) -> None:
        """Forget router calls that an exception interrupted on this thread."""
        for hooks in self._hooks:
            hooks.discard()

    def _losses(self) -> Lost:
        return replace(
            self._lost,
            overwritten=self._recorder.overwritten,
            misread={h.site.name: h.misread for h in self._hooks if h.misread is not None},
            never_called=tuple(h.site.name for h in self._hooks if h.calls == 0 and h.misread is None),
        )

    # -- the model's own forward ----------------------------------------------------------------------

    def _step(self) -> int:
        if self._profiler is not None:
            return int(getattr(self._profiler, "step_num", 0))
        return self._next_forward if self._explicit_step is None else self._explicit_step

    def _samples_step(self, step: int) -> bool:
        return step >= self.warmup and (step - self.warmup) % self.every == 0

    def _set_level(self, level: Level) -> None:
        for hooks in self._hooks:
            hooks.set_level(level)

    def _current_context(self) -> ForwardContext:
        context = self._contexts.get(threading.get_ident())
        if context is None:  # a submodule called on its own, or a replica's thread
            stage: Stage = "train" if torch.is_grad_enabled() and self.model.training else "prefill"
            context = ForwardContext(self._step(), stage)
        return context

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._ranges.close_thread()  # left open by an interruption that no hook saw, such as Ctrl-C
        self._recorder.end_forward()  # recomputed calls of the backward before
        step = self._step()
        self._next_forward += 1
        self.forwards_seen += 1
        if not self._samples_step(step):
            self._set_level(Level.OFF)
            return
        self.forwards_recorded += 1
        self._set_level(Level.RANGES if profiler_is_recording() else Level.RECORD)
        self._contexts[threading.get_ident()] = self._describe_forward(step, args, kwargs)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if output is None:
            self.abandon_calls()
        else:
            for hooks in self._hooks:
                hooks.finish()
        self._recorder.end_forward()

    def _describe_forward(self, step: int, args: Any, kwargs: dict[str, Any]) -> ForwardContext:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None
        if torch.is_grad_enabled() and self.model.training:
            stage: Stage = "train"
        else:
            stage = "decode" if length == 1 else "prefill"
        return ForwardContext(step, stage, _padding(given.get("attention_mask"), length))


def _padding(mask: Any, length: int | None) -> Tensor | None:
    """[B * length] bool, True where the token is padding, from a 2-D mask that may cover a cache too."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or length is None or mask.shape[1] < length:
        return None
    return (mask[:, -length:] == 0).flatten()


def _forward_parameter_names(model: nn.Module) -> Sequence[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def _describe_layers(layers: LayerSelector) -> Any:
    if layers is None:
        return None
    return getattr(layers, "__name__", "predicate") if callable(layers) else list(layers)
