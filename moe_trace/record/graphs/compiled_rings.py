"""Ring buffers of a model's routers and counters of its forwards, made while a graph is traced or captured.

The tensor operations (`ring_buffer.py`) are compiled or captured into the user's graphs; everything else
runs once, while the graph is being built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from moe_trace.data.schema import STAGES, Stage
from moe_trace.find.contracts import RouterOutput
from moe_trace.find.private.torch_names import CAN_RECORD_GRAPHS, is_exporting
from moe_trace.find.routers import RouterSite
from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.graphs.forward_in_graph import CapturedForwards, ForwardInGraph
from moe_trace.record.graphs.forwards import GraphForwards
from moe_trace.record.graphs.ids_ring import ROOMS, IdsRing, Room, room_for
from moe_trace.record.graphs.memory import captures_now, device_of, keep_for_graphs, outside_graphs
from moe_trace.record.graphs.ring_buffer import (
    RING_KINDS,
    ForwardCounter,
    GraphRing,
    RingKind,
    RingShape,
    ring_kind,
)

_SHAPE_FIELDS = ("num_experts", "top_k", "num_slots")
Kind = RingKind | Room


class SiteRings:
    """The rings of one router, each allocated when the first call that needs it is traced or captured.

    `write` becomes part of the user's graphs: it uses tensor operations only, and attributes that are the
    same for all routers of a model, so that layers can share their compiled code.
    """

    def __init__(
        self,
        num_experts: int,
        forward: ForwardInGraph,
        captured: CapturedForwards,
        allocate: Callable[[SiteRings, Kind, int, int], None],
        *,
        keeps_ids: bool,
    ) -> None:
        self.num_experts = num_experts
        self.keeps_ids = keeps_ids
        """Whether routes are recorded."""
        self.ids_512: IdsRing | None = None
        self.ids_4096: IdsRing | None = None
        self.ids_32768: IdsRing | None = None
        self._forward, self._captured, self._allocate = forward, captured, allocate
        self.small: GraphRing | None = None
        self.medium: GraphRing | None = None
        self.reduced: GraphRing | None = None
        self.misreads = False
        self.traced = False
        """Whether a compiler traced a call; False if calls were only captured by a stream."""

    @torch.compiler.assume_constant_result
    def prepare(self, kind: Kind, top_k: int, classes: int) -> int:
        """Allocate the ring if it is missing; runs while tracing, never in the graph."""
        self.traced |= not captures_now()
        if getattr(self, kind) is None:
            self._allocate(self, kind, top_k, classes)
        return 0

    @torch.compiler.assume_constant_result
    def misread(self) -> int:
        """Note that a call does not match the router's contract; runs while tracing, never in the graph."""
        self.misreads = True
        return 0

    def write(self, reading: RouterOutput, forward: ForwardInGraph | None = None) -> None:
        """Write a router output into the slot of `forward`, by default the one being compiled."""
        forward = forward or self._forward
        if not CAN_RECORD_GRAPHS:
            return
        tokens = reading.index_TK.shape[0]
        kind = ring_kind(tokens)
        self._write(kind, reading, forward)
        room = room_for(tokens) if self.keeps_ids and kind == "reduced" else None
        if room is not None:
            self._write(room, reading, forward)

    def _write(self, kind: Kind, reading: RouterOutput, forward: ForwardInGraph) -> None:
        tokens, top_k = reading.index_TK.shape
        self.prepare(kind, top_k, 0 if reading.logits_TE is None else reading.logits_TE.shape[-1])
        ring = getattr(self, kind)
        forward.write(ring, ring.body(reading), tokens)

    def write_captured(self, reading: RouterOutput) -> None:
        """Write a router output while a stream is captured; replays of the graph repeat the write."""
        with torch.no_grad():
            self.write(reading, self._captured.now())
        keep_for_graphs(
            [memory for ring in self.made().values() for memory in (ring.data, *ring.counter.memory)]
        )

    def take_over(self, other: SiteRings) -> None:
        """Take over the ring memory of `other`, which is left with none."""
        self.traced |= other.traced
        self.misreads |= other.misreads
        for name in (*RING_KINDS, *ROOMS):
            setattr(self, name, getattr(other, name))
            setattr(other, name, None)

    def made(self, kinds: Iterable[Kind] = (*RING_KINDS, *ROOMS)) -> dict[Any, Any]:
        """Return the rings of these kinds that are allocated, by kind."""
        return {kind: ring for kind in kinds if (ring := getattr(self, kind)) is not None}


class ModelRings:
    """The rings of all routers of a model, and a counter of its forwards for each device.

    Args:
        routers: routers; each gets its own `SiteRings`.
        forwards: the host's record of the model's forwards.
        started: called while tracing or capturing, whenever the hooks become part of a graph.
        counting: called after a counter is made, with the number of the last forward that it does not count.
        keeps_ids: whether routes are recorded.
    """

    def __init__(
        self,
        routers: Sequence[RouterSite],
        forwards: GraphForwards,
        *,
        started: Callable[[], None],
        counting: Callable[[int], None],
        keeps_ids: bool = False,
    ) -> None:
        self.in_graph = ForwardInGraph()
        self._captured = CapturedForwards()
        shared = self.in_graph, self._captured, self._allocate
        self.sites = [SiteRings(router.info.num_experts, *shared, keeps_ids=keeps_ids) for router in routers]
        self.counters: list[ForwardCounter] = []
        self.tells = False
        """Whether a host framework reports the phases of tokens; read when a counter is made."""
        self._routers = list(routers)
        self._forwards = forwards
        self._started = started
        self._counting = counting

    @property
    def slots(self) -> int:
        """Number of forwards after which the first ring wraps around."""
        return min((ring.slots for site in self.sites for ring in site.made().values()), default=1)

    @property
    def compiled(self) -> bool:
        """Whether any graph that writes to the rings was made by a compiler."""
        return any(site.traced for site in self.sites)

    def by_shape(self) -> dict[RingShape, list[int]]:
        """Return the indices of the routers that have a ring of each shape."""
        found: dict[RingShape, list[int]] = {}
        for index, site in enumerate(self.sites):
            for ring in site.made(RING_KINDS).values():
                found.setdefault(ring.shape, []).append(index)
        return found

    @torch.compiler.assume_constant_result
    def prepare(self) -> int:
        """Allocate the counters; runs while tracing, never in the graph."""
        if not self.counters:
            for device in {device_of(site.router): None for site in self._routers}:
                self._counter(device)
            self._counting(self._forwards.seen())  # the graph itself counts the forward in progress
        self._started()
        return 0

    def start_in_graph(self, stage_code: int, level: int, forward: ForwardInGraph | None = None) -> None:
        """Handle the call of an entry module of the model inside a graph.

        The forward begins with the outermost entry module, unless the host saw it begin; the graph is
        recompiled if that is different in a later call.
        """
        forward = forward or self.in_graph
        if not CAN_RECORD_GRAPHS or is_exporting() or forward.under_way:
            return
        self.prepare()
        for counter in self.counters:
            counter.start_in_graph()
        deferred = forward is self.in_graph and not torch.is_grad_enabled()
        forward.start(stage_code, level, together=deferred)

    def end_in_graph(self, level: int) -> None:
        """Handle the return of an entry module, inside a graph or after a graph break."""
        if is_exporting():
            return
        if not is_compiling():
            self._captured.end(level)
        with torch.no_grad():
            self.in_graph.end(level)

    def take_over(self, other: ModelRings, *, forwards: int | None = None) -> None:
        """Take over an earlier tracer's rings; clear them and continue counting from `forwards`, if given."""
        by_key = {(id(r.router), r.name): rings for r, rings in zip(other._routers, other.sites, strict=True)}
        for router, site_rings in zip(self._routers, self.sites, strict=True):
            if (rings := by_key.get((id(router.router), router.name))) is not None:
                site_rings.take_over(rings)
        self.tells |= other.tells
        self.counters += other.counters
        other.counters.clear()
        if forwards is None:
            return
        for counter in self.counters:
            with outside_graphs(counter.device):
                counter.restart(forwards=forwards, epoch=self._forwards.epoch)
                for ring in (ring for site in self.sites for ring in site.made().values()):
                    if ring.counter is counter:
                        ring.data.zero_()
        self._counting(forwards)

    def begin_on_host(self) -> None:
        """Handle the start of a forward that the host sees."""
        self.in_graph.forget(on_host=True)
        self._captured.forget()

    def end_on_host(self) -> None:
        """Handle the end of a forward whose start the host saw."""
        self.in_graph.forget()

    def start_captured(self, stage: Stage, level: int) -> None:
        """Handle the call of an entry module while a stream is captured into a graph."""
        if not self._captured.begins(level):
            return
        stage_code = STAGES.index(stage)
        with torch.no_grad():  # no compiler fuses captured writes, so they need not wait for the end
            self.start_in_graph(stage_code, level, self._captured.now())
        if not self.in_graph.under_way:  # for compiled code that is called in the capture
            self.in_graph.start(stage_code, level, together=False)
        keep_for_graphs([memory for counter in self.counters for memory in counter.memory])

    def start_on_host(self, epoch: int, stage: Stage, batch: BatchTokens | None) -> None:
        """Handle the start of a forward whose hook runs eagerly."""
        with torch.no_grad():
            for counter in self.counters:
                counter.start_on_host(epoch, stage)
        self.describe(batch)

    def describe(self, batch: BatchTokens | None) -> None:
        """Write the phases of the tokens of the forward that begins to the counters."""
        with torch.no_grad():
            for counter in self.counters:
                counter.describe(batch)

    def _allocate(self, site: SiteRings, kind: Kind, top_k: int, classes: int) -> None:
        template = self._routers[self.sites.index(site)].info
        make: Any = IdsRing if kind in ROOMS else GraphRing
        for other, router in zip(self.sites, self._routers, strict=True):
            # Allocate for all routers alike at once: a layer whose ring appeared later could not share code.
            same_shape = all(getattr(router.info, key) == getattr(template, key) for key in _SHAPE_FIELDS)
            if same_shape and getattr(other, kind) is None:
                counter = self._counter(device_of(router.router))
                sizes: dict[str, Any] = {"num_experts": site.num_experts or classes, "top_k": top_k}
                sizes |= {"sites": len(self.sites), "counter": counter}
                if make is GraphRing:
                    sizes |= {"classes": classes, "num_slots": router.info.num_slots}
                with outside_graphs(counter.device):
                    setattr(other, kind, make(kind, **sizes))
        self._started()

    def _counter(self, device: torch.device) -> ForwardCounter:
        for counter in self.counters:
            if counter.device == device:
                return counter
        seen = self._forwards.seen()
        with outside_graphs(device):
            numbers = {"forwards": seen, "epoch": self._forwards.epoch}
            counter = ForwardCounter(device, **numbers, tells=self.tells)
            counter.describe(self._forwards.batch)
        self.counters.append(counter)
        self._counting(seen - 1)  # the forward in progress is the first that writes
        return counter
