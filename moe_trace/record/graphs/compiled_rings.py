"""The rings of a model's routers, and the counters of its forwards: made while a graph is traced or captured.

What is compiled or captured here becomes part of other people's graphs: tensor work alone (`ring_buffer.py`).
All rest runs once, while the graph is being made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moe_trace.data.schema import Stage
from moe_trace.find.contracts import RouterOutput
from moe_trace.find.private.torch_names import CAN_RECORD_GRAPHS, is_exporting
from moe_trace.find.routers import RouterSite
from moe_trace.record.graphs.forwards import GraphForwards
from moe_trace.record.graphs.memory import captures_now, keep_for_graphs, outside_graphs
from moe_trace.record.graphs.ring_buffer import ForwardCounter, GraphRing, RingKind, RingShape, ring_kind

_CPU = torch.device("cpu")


class ForwardInGraph:
    """The model's forward that is being traced or captured; outside of one, its routers write at once.

    A compiler makes one kernel of all routers' writes when they stand together at the end of the forward, and
    one for every second router where they stand apart.
    """

    def __init__(self) -> None:
        self.on_host = False
        """Whether the host saw the forward under way begin: then no module inside it begins one."""
        self._code: int | None = None
        self._level = 0
        self._waiting: list[tuple[GraphRing, Tensor, int]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a forward was begun that has not ended."""
        return self.on_host or self._code is not None

    def start(self, stage_code: int, level: int, *, together: bool) -> None:
        """The model's forward begins.

        Args:
            level: of the module that it begins with, and will end with.
            together: its routers' writes shall wait for its end. Not where a backward will follow: what waits
                cannot leave a layer that is checkpointed.
        """
        self._code, self._level = stage_code << 1 | 1, level
        self._waiting = [] if together else None

    def write(self, ring: GraphRing, body: Tensor, tokens: int) -> None:
        """Write a row, now or at the end."""
        if self._waiting is None:
            ring.put(body, tokens, self._code)
        else:
            self._waiting.append((ring, body, tokens))

    def end(self, level: int) -> None:
        """A module that the model may be entered through has returned."""
        if self._code is None or level != self._level:
            return
        for ring, body, tokens in self._waiting or ():
            ring.put(body, tokens, self._code)
        self.forget()

    def forget(self, on_host: bool = False) -> None:
        """No forward is under way, or one `on_host`; what one left that was interrupted is dropped."""
        self._code = self._waiting = None
        self.on_host = on_host


class SiteRings:
    """The rings of one router; each is made when a call that needs it is traced or captured.

    `write` runs inside other people's graphs: nothing but tensor work, and attributes that are the same for
    all routers of a model, so that layers may share their compiled code.
    """

    def __init__(
        self,
        num_experts: int,
        forward: ForwardInGraph,
        allocate: Callable[[SiteRings, RingKind, int, int], None],
    ) -> None:
        self.num_experts = num_experts
        self._forward = forward
        self.small: GraphRing | None = None
        self.medium: GraphRing | None = None
        self.reduced: GraphRing | None = None
        self.misreads = False
        self.traced = False
        """Whether a compiler traced it, rather than a stream captured it."""
        self._allocate = allocate

    @torch.compiler.assume_constant_result
    def prepare(self, kind: RingKind, top_k: int, classes: int) -> int:
        """Runs while tracing, never in the graph."""
        self.traced |= not captures_now()
        if getattr(self, kind) is None:
            self._allocate(self, kind, top_k, classes)
        return 0

    @torch.compiler.assume_constant_result
    def misread(self) -> int:
        """A call has another form than its contract expects; runs while tracing, never in the graph."""
        self.misreads = True
        return 0

    def write(self, reading: RouterOutput) -> None:
        """Put a decision into the slot of the forward under way."""
        if not CAN_RECORD_GRAPHS:
            return
        tokens, top_k = reading.index_TK.shape
        classes = 0 if reading.logits_TE is None else reading.logits_TE.shape[-1]
        kind = ring_kind(tokens)
        self.prepare(kind, top_k, classes)
        ring = self.small if kind == "small" else self.medium if kind == "medium" else self.reduced
        assert ring is not None  # `prepare` made it
        body = ring.reduced(reading) if kind == "reduced" else ring.raw(reading)
        self._forward.write(ring, body, tokens)

    def write_captured(self, reading: RouterOutput) -> None:
        """The same while a stream is captured into a graph, whose replays will write."""
        with torch.no_grad():
            self.write(reading)
        keep_for_graphs([memory for ring in self.all() for memory in (ring.data, *ring.counter.memory)])

    def all(self) -> Iterator[GraphRing]:
        yield from (ring for ring in (self.small, self.medium, self.reduced) if ring is not None)


class ModelRings:
    """The rings of all routers of a model, and a counter of its forwards for each device.

    Args:
        routers: one `SiteRings` is made for each.
        forwards: what the host knows of the model's forwards.
        started: called while tracing or capturing, whenever a graph takes up the hooks.
        counting: called when a counter was made, with the number of the last forward that it does not count.
    """

    def __init__(
        self,
        routers: Sequence[RouterSite],
        forwards: GraphForwards,
        *,
        started: Callable[[], None],
        counting: Callable[[int], None],
    ) -> None:
        self.in_graph = ForwardInGraph()
        self.sites = [SiteRings(router.info.num_experts, self.in_graph, self._allocate) for router in routers]
        self.counters: list[ForwardCounter] = []
        self._routers = list(routers)
        self._forwards = forwards
        self._started = started
        self._counting = counting

    @property
    def slots(self) -> int:
        """Forwards after which the first slot of some ring is written again."""
        return min((ring.slots for site in self.sites for ring in site.all()), default=1)

    @property
    def compiled(self) -> bool:
        """Whether a compiler made any of the graphs that write here."""
        return any(site.traced for site in self.sites)

    def by_shape(self) -> dict[RingShape, list[int]]:
        """The routers that have a ring of each shape."""
        found: dict[RingShape, list[int]] = {}
        for index, site in enumerate(self.sites):
            for ring in site.all():
                found.setdefault(ring.shape, []).append(index)
        return found

    @torch.compiler.assume_constant_result
    def prepare(self) -> int:
        """Make the counters; runs while tracing, never in the graph."""
        if not self.counters:
            for device in {_device(site): None for site in self._routers}:
                self._counter(device)
            self._counting(self._forwards.seen())  # the one under way is counted by the graph itself
        self._started()
        return 0

    def start_in_graph(self, stage_code: int, level: int) -> None:
        """A module that the model may be entered through is called inside a graph.

        The forward begins with the outermost one, unless the host saw it begin; the graph is compiled again
        where it is used in the other way later.
        """
        if not CAN_RECORD_GRAPHS or is_exporting() or self.in_graph.under_way:
            return
        self.prepare()
        for counter in self.counters:
            counter.start_in_graph()
        self.in_graph.start(stage_code, level, together=not torch.is_grad_enabled())

    def end_in_graph(self, level: int) -> None:
        """It has returned, inside a graph or behind one that was broken off."""
        if is_exporting():
            return
        with torch.no_grad():
            self.in_graph.end(level)

    def begin_on_host(self) -> None:
        """A forward begins that the host sees."""
        self.in_graph.forget(on_host=True)

    def end_on_host(self) -> None:
        """The forward that the host saw begin is over."""
        self.in_graph.forget()

    def start_captured(self, stage_code: int, level: int) -> None:
        """The same while a stream is captured into a graph."""
        if self.in_graph.under_way:
            return
        with torch.no_grad():
            self.start_in_graph(stage_code, level)
        # Nobody makes one kernel of what is captured.
        self.in_graph.start(stage_code, level, together=False)
        keep_for_graphs([memory for counter in self.counters for memory in counter.memory])

    def start_on_host(self, epoch: int, stage: Stage) -> None:
        """The same where the model's hook runs eagerly."""
        with torch.no_grad():
            for counter in self.counters:
                counter.start_on_host(epoch, stage)

    def _allocate(self, site: SiteRings, kind: RingKind, top_k: int, classes: int) -> None:
        wanted = self._routers[self.sites.index(site)].info
        for other, router in zip(self.sites, self._routers, strict=True):
            # All routers of a kind at once: a layer whose ring appears later could not share their code.
            alike = (router.info.num_experts, router.info.top_k) == (wanted.num_experts, wanted.top_k)
            if alike and getattr(other, kind) is None:
                counter = self._counter(_device(router))
                with outside_graphs(counter.device):
                    ring = GraphRing(
                        kind,
                        num_experts=site.num_experts or classes,
                        top_k=top_k,
                        classes=classes,
                        sites=len(self.sites),
                        counter=counter,
                    )
                setattr(other, kind, ring)
        self._started()

    def _counter(self, device: torch.device) -> ForwardCounter:
        for counter in self.counters:
            if counter.device == device:
                return counter
        seen = self._forwards.seen()
        with outside_graphs(device):
            counter = ForwardCounter(device, forwards=seen, epoch=self._forwards.epoch)
        self.counters.append(counter)
        self._counting(seen - 1)  # the forward under way is the first that writes
        return counter


def _device(site: RouterSite) -> torch.device:
    """Where the router's weights are, which is where its decision is made."""
    for tensor in (*site.router.parameters(), *site.router.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
