"""`MoETracer`: hooks on a model's routers while it is active, and access to what they recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from moe_trace.data.calls.table import CallTable
from moe_trace.data.errors import MoETraceError, UsageError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.data.routes.options import Routes
from moe_trace.data.schema import Lost, Placement, Recording, RoutingSample
from moe_trace.data.summary import Summary, summarize
from moe_trace.find.private.torch_names import warn_of_missing
from moe_trace.find.routers import LayerSelector, RouterSite, find_routers
from moe_trace.record.calls.recorder import DEFAULT_CAPACITY_BYTES, Recorder
from moe_trace.record.dry_run import warm_up
from moe_trace.record.forward.batch_tokens import BatchTokens, TokenProvider
from moe_trace.record.forward.copied_models import HookOwner
from moe_trace.record.forward.steps import Steps
from moe_trace.record.graphs.capture import CaptureNotes
from moe_trace.record.graphs.compiled import warn_if_compiled_before
from moe_trace.record.graphs.memory import captures_now
from moe_trace.record.graphs.ring_reader import RingReader
from moe_trace.record.hooks.events import CallClock
from moe_trace.record.hooks.model import ModelHooks
from moe_trace.record.lost import lost_so_far, recorded_calls, router_infos, unread_in_graphs
from moe_trace.record.muted import mute, recompile, unmute
from moe_trace.record.options import TracerOptions
from moe_trace.record.parallel.environment import describe_model, versions
from moe_trace.record.parallel.process import ParallelModel
from moe_trace.record.routes.beside import end_routes, write_beside
from moe_trace.record.routes.recorder import routes_recorder
from moe_trace.record.sessions import Sessions
from moe_trace.timeline.counter_tracks import Tracks
from moe_trace.timeline.merge import merge_recording


class MoETracer(HookOwner):
    """Record the decisions of every router of a model while active as a context manager.

    Args:
        model: any module that contains Mixture-of-Experts routers, wrappers included.
        layers: selection of routers: layer indices, labels, module paths, or a predicate on `RouterSite`.
        every: record every n-th step.
        warmup: number of steps to skip at the start.
        capacity: number of router calls to keep; beyond it the oldest are dropped and counted.
        capacity_bytes: host memory for their metrics; beyond it the oldest calls are dropped too.
        tracks: counter tracks of the trace: the compact band, per layer, per expert.
        clock: additional clock for the times of each router and its experts, such as `DeviceClock`.
        routes: also record which token went to which expert, for `routes()`; True, or `Routes` with options.
        auto_attach: add the routing to the traces of every torch profiler that records while the tracer is
            active, whoever created it. With False, only to those passed to `attach`.

    A step is a profiler step (`prof.step()`) while a profiler records. Without one, a step is one forward of
    `model`, until `step()` is called; from then on `step()` alone counts steps.

    Raises:
        NoRoutersFound: the model has no router that a known contract reads.
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
        capacity_bytes: int = DEFAULT_CAPACITY_BYTES,
        tracks: Tracks = ("band",),
        clock: CallClock | None = None,
        auto_attach: bool = True,
        routes: bool | Routes = False,
    ) -> None:
        self._options = TracerOptions(layers, every, warmup, capacity, capacity_bytes)
        self.model = model
        self.sites: list[RouterSite] = find_routers(model, layers=layers)
        self.tracks = tracks
        self._steps = Steps(every=every, warmup=warmup)
        self._recorder = Recorder(capacity=capacity, capacity_bytes=capacity_bytes)
        self._recorder.routes = routes_recorder(routes, self.sites, self._steps, self._recorder.refusals)
        self._graphs = RingReader(
            self.sites, self._recorder, self._steps, started=lambda: self._hooks.watch.graph_started()
        )
        self._captures = CaptureNotes()
        parts: dict[str, Any] = {"recorder": self._recorder, "graphs": self._graphs, "steps": self._steps}
        self._hooks = ModelHooks(model, self.sites, **parts, clock=clock, captures=self._captures)
        self._active = False
        self._sessions = Sessions(self, self._steps, auto=auto_attach)
        self._placements: dict[tuple[str, int], Placement] = {}
        self._traces_lost: dict[str, Lost] = {}
        """Mapping from the path of a trace to what merging into it lost."""
        self.exported_samples: Sequence[RoutingSample] = ()
        """Samples of the last exported trace."""
        self._description = describe_model(model, self.sites)
        self._parallel = ParallelModel(model)

    @property
    def every(self) -> int:
        """Interval between recorded steps, in steps."""
        return self._steps.every

    @property
    def warmup(self) -> int:
        """Number of steps skipped at the start."""
        return self._steps.warmup

    @property
    def forwards_seen(self) -> int:
        """Number of forwards of the model that the host has seen while the tracer was active."""
        return self._steps.forwards

    @property
    def forwards_recorded(self) -> int:
        """Number of those forwards that belong to a recorded step."""
        return self._hooks.watch.forwards_recorded

    def start(self) -> None:
        """Install the hooks. Samples of earlier activations are kept.

        On a GPU the first start in a process takes seconds, because kernels are compiled here rather than in
        a step. Start the tracer before the profiler; if a profiler already records, slower kernels are used.
        """
        if self._active:
            raise MoETraceError("this MoETracer is already active; leave it before entering it again")
        self._active = True
        warn_of_missing()
        warm_up(self.sites)
        self._parallel = ParallelModel(self.model)  # the model may have been distributed or wrapped since
        compiled = unmute(self.sites, self._graphs)
        sending = self._parallel.sending if self._parallel.world_size > 1 else None
        self._hooks.install(recording=self.samples_this_step(), sending=sending, compiled=compiled)
        self._sessions.start()

    def stop(self) -> None:
        """Remove the hooks, leaving muted ones in code compiled with them; recorded data is kept."""
        self._sessions.stop()
        self.mark_graphs()
        unread = bool(unread_in_graphs(self._hooks, self._graphs))
        warn_if_compiled_before(self.model, called=self.called or unread)
        mute(self._hooks, self._graphs)
        self._active = False
        if not captures_now():
            self._recorder.reduce()
            end_routes(self._recorder.routes, self.routes)

    def __enter__(self) -> MoETracer:
        self.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.abandon_calls()
        self.stop()

    def step(self) -> None:
        """End a step, where no attached profiler counts steps."""
        self.mark_graphs()
        self._steps.end()

    def count_steps_by_hand(self) -> None:
        """Count steps by `step()` alone from now on, even before its first call."""
        self._steps.count_by_hand()

    def describe_tokens(self, told: BatchTokens | TokenProvider | None) -> None:
        """Describe the tokens of a forward whose arguments do not; call this before compiling the model.

        Args:
            told: `BatchTokens` of the next forward, a callable that returns those of each, or None to reset.
        """
        self._hooks.describe(told)

    def attach(self, prof: Any) -> None:
        """Merge the routing into every export of one profiler, whose `step_num` becomes the step.

        An active tracer merges automatically into every profiler that records (`auto_attach`), and warns
        where it cannot; a profiler attached here raises instead.
        """
        self._sessions.attach(prof)

    def detach(self, prof: Any) -> None:
        """Undo `attach`. Stopping a tracer does not detach it, since traces are mostly exported later."""
        self._sessions.detach(prof)

    def samples(self, *, since_step: int = 0) -> list[RoutingSample]:
        """Return one sample per router call recorded since a step, by time. Waits for the device."""
        self._collect()
        found = ((s, self._placements.get((s.name, s.call))) for s in self._recorder.drain(since_step))
        return [s if place is None else replace(s, placement=place) for s, place in found]

    def routes(self) -> RecordedRoutes:
        """Return the experts of each token, in the order of the calls. Waits for the device.

        Raises:
            UsageError: the tracer was created without `routes=`.
        """
        if self._recorder.routes is None:
            raise UsageError("this MoETracer records no routes; make it with MoETracer(model, routes=True)")
        self._collect()
        self._recorder.reduce()
        return self._recorder.routes.routes(self._description, self._parallel)

    def recording(self, *, trace: str | Path | None = None) -> Recording:
        """Return everything recorded, with the model's description and what was lost.

        Args:
            trace: path of the trace it is for; recorded routes are written next to it and referenced.
        """
        samples = tuple(self.samples())
        return Recording(
            model=self._description,
            options=self._options.as_recorded(),
            routers=router_infos(self._hooks),
            samples=samples,
            lost=lost_so_far(self._hooks, self._recorder, self._graphs, self._traces_lost.values()),
            rank=self._parallel.rank,
            world_size=self._parallel.world_size,
            versions=versions(),
            parallel=self._parallel.describe(samples),
            graph_marks=self._graphs.marks(),
            captured_graphs=self._captures.graphs(),
            graphs_compiled=self._graphs.rings.compiled,
            annotated_nodes=self._captures.annotated_nodes(),
            compiled_graphs=self._graphs.launches.graphs(),
            routes=write_beside(trace, self._recorder.routes, self.routes),
        )

    def summary(self) -> Summary:
        """Return metrics per router; latencies are from the written trace if there is one, else the clock."""
        return summarize(self.recording())

    def merge_into(self, trace_path: str | Path) -> None:
        """Merge the recording into a trace on disk; usable as torchtitan's `trace_post_processor`."""
        merged = merge_recording(Path(trace_path), [self.recording(trace=trace_path)], tracks=self.tracks)
        self.accept(merged.placed[0], merged.lost, trace_path)

    def accept(self, placed: CallTable, lost: Lost, trace_path: str | Path) -> None:
        """Store the placements of one trace's samples and its losses; later merges replace earlier ones."""
        self.exported_samples = placed
        placements = zip(placed.call_keys(), placed.places.to_placements(), strict=True)
        self._placements.update((call, placement) for call, placement in placements if placement is not None)
        self._traces_lost[os.path.abspath(trace_path)] = lost

    def samples_this_step(self) -> bool:
        """Return whether the current step is recorded."""
        return self._steps.samples(self._steps.now())

    def take_batches(self) -> list[Any]:
        """Remove recorded calls without waiting for the device; pass them to `samples_of`, on any thread."""
        if self._graphs.writes:
            self._graphs.ship()
        self._hooks.join()
        return self._recorder.take()

    def samples_of(self, batches: list[Any]) -> list[RoutingSample]:
        """Return the samples of `take_batches`, and those of compiled code. Waits for the copies."""
        if self._graphs.writes or self._graphs.shipped:
            self._graphs.collect()
            batches = batches + self._recorder.take(reduce=False)
        return self._recorder.samples_of(batches)

    def calls_by_router(self) -> dict[str, int]:
        """Return the number of recorded calls by module path of the router."""
        self._collect()
        counts = recorded_calls(self._hooks, self._graphs)
        return {site.name: calls for site, calls in zip(self.sites, counts, strict=True)}

    def _collect(self) -> None:
        """Pass all observed calls to the recorder. Waits for the device where graphs write."""
        self._hooks.join()
        self.mark_graphs()
        self._graphs.drain()

    @property
    def called(self) -> bool:
        """Whether any router was called, or compiled with its hooks."""
        return self._graphs.writes or any(state.seen for state in self._hooks.calls.counts)

    recompile = staticmethod(recompile)

    def abandon_calls(self) -> None:
        """Discard router calls that an exception interrupted on this thread."""
        self._hooks.watch.abandon()

    def mark_graphs(self, *, profiled: bool | None = None) -> None:
        """Attribute everything that graphs wrote since the last mark to the current step.

        Args:
            profiled: whether a profiler recorded it; None to use whether one records now.
        """
        if self._graphs.writes and self._active:
            self._graphs.mark_step(self._steps, profiled)
