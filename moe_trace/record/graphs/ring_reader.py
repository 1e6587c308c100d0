"""Transfer of router outputs from the rings of compiled code and CUDA graphs to the recorder.

    write    tensor operations that become part of the graph,                  ring_buffer.py
             and the counters of its forwards                                  compiled_rings.py
    ship     reduce all rings in one batch of kernels, copy asynchronously     device_to_host.py
    drain    wait, attribute each row to its forward and step, hand it over    forwards.py

This module schedules these steps: rings are shipped before one of them is full.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from moe_trace.data.compiled_graph import CompiledGraph
from moe_trace.data.schema import STAGES, GraphMark
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.forward.ranges import profiler_is_recording
from moe_trace.record.forward.steps import Steps
from moe_trace.record.graphs.compiled_rings import ModelRings
from moe_trace.record.graphs.device_to_host import Shipment, ship
from moe_trace.record.graphs.forwards import REMEMBERED, GraphForwards, Segment
from moe_trace.record.graphs.ids_ring import ROOMS, ShippedIds
from moe_trace.record.graphs.launch_lists import LaunchLists
from moe_trace.record.graphs.memory import captures_now, is_capturing
from moe_trace.record.graphs.ring_buffer import EXACT


class RingReader:
    """Reader that ships the rings of a model before they are full and passes their rows to its recorder.

    Args:
        started: called while tracing or capturing, whenever the hooks become part of a graph.
        steps: the steps that are recorded, and the number of forwards that the host has seen.
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        recorder: Recorder,
        steps: Steps,
        *,
        started: Callable[[], None],
    ) -> None:
        self.launches = launches = LaunchLists(sites)

        def graph_started() -> None:
            started()
            launches.watch()

        self.forwards = GraphForwards(lambda: steps.forwards, steps.samples)
        self.rings = ModelRings(
            sites,
            self.forwards,
            started=graph_started,
            counting=self._counting,
            keeps_ids=recorder.routes is not None,
        )
        self.calls = [0] * len(sites)
        """Number of recorded calls drained so far, by router."""
        self._routers = list(sites)
        self._recorder = recorder
        self._keeps_ids = recorder.routes is not None
        self._lock = threading.RLock()
        self.shipped: deque[Shipment] = deque()
        self._unshipped = 0
        """Number of forwards that the host saw begin since the rings were last shipped."""
        self._shipped_at = 0
        self._shipped_epoch = 0
        """Epoch of the forward in progress when the rings were last shipped."""
        self._drained = [0] * len(sites)
        """Number of the last forward whose row was drained, by router."""
        self._overwritten = 0

    @property
    def writes(self) -> bool:
        """Whether any graph writes into a ring."""
        return bool(self.rings.counters)

    @property
    def overwritten(self) -> int:
        """Number of calls that were lost."""
        return self._overwritten + self.forwards.forgotten

    def marks(self) -> tuple[GraphMark, ...]:
        """Return the marks that were set while a profiler recorded. Waits for their copies."""
        with self._lock:
            return self.forwards.marks()

    def _counting(self, before: int) -> None:
        """Handle a new counter, whose first forward is the one after `before`."""
        self._drained = [before] * len(self._routers)
        self.forwards.counted_after = before
        if self.forwards.remember():
            self._unshipped = 1

    def release(self) -> bool:
        """Ship the rings a last time; return whether they were read and another tracer can take them over."""
        if not self.rings.compiled or not self._may_read():
            return False
        self.ship()
        return True

    def take_over(self, rings: ModelRings, graphs: Iterable[CompiledGraph]) -> bool:
        """Take over the rings of code that was compiled under an earlier tracer, from the next forward on.

        Returns:
            False, with nothing taken over, if graphs already write to rings of this reader.
        """
        if self.writes:
            return False
        with self._lock:
            self._take()
            forwards = max([self.forwards.seen(), *(last for last, _ in self.forwards.segments())])
            self.rings.take_over(rings, forwards=forwards)
            self._shipped_at = forwards
        self.launches.know(graphs)
        self.launches.watch()  # code compiled from now on finds these rings, so `started` may not be called
        return True

    # -- called during a forward ----------------------------------------------------------------------

    def start_on_host(self, forward: ForwardContext) -> None:
        """Begin a forward whose hook runs eagerly; ship the rings before they are full.

        Called only if graphs write to the rings.
        """
        self.rings.begin_on_host()
        self.forwards.remember()
        if self._unshipped >= self.rings.slots:
            self.ship()
        self._unshipped += 1
        self.rings.start_on_host(forward.epoch, forward.stage, forward.batch)

    def describe(self, batch: BatchTokens) -> None:
        """Record a host framework's description of the next forward, whose start the host may not see."""
        self.forwards.describe(batch)
        self.rings.describe(batch)

    def mark_step(self, steps: Steps, profiled: bool | None) -> None:
        """Assign all forwards since the last mark to the current step; see `MoETracer.mark_graphs`."""
        step = None if steps.are_forwards else steps.now()
        recording = profiler_is_recording()
        sampled = step is None or steps.samples(step)
        self.mark(Segment(step, recording if profiled is None else profiled, sampled), in_trace=recording)

    def mark(self, segment: Segment, *, in_trace: bool) -> None:
        """Assign all forwards since the last mark to `segment`, without synchronizing.

        Args:
            in_trace: whether a profiler records, so that the copy of the count appears in its trace.
        """
        if not self._may_read():
            return
        with self._lock:
            known = self.forwards.mark(segment, self.rings.counters[0].forwards, in_trace=in_trace)
            if known - self._shipped_at >= max(1, self.rings.slots // 2):
                self._shipped_at = known
                self.ship()

    def ship(self) -> None:
        """Reduce all rings and start their copies to the host, without synchronizing."""
        by_shape = self.rings.by_shape()
        with self._lock, torch.no_grad():
            self._unshipped = 0
            self._shipped_epoch = self.forwards.epoch
            for shape, indices in by_shape.items():
                sites = [(index, self.rings.sites[index]) for index in indices]
                rings = [getattr(site, shape.kind) for _, site in sites]
                self.shipped.append(shipped := ship(shape, indices, rings, routes=self._keeps_ids))
                if self._keeps_ids and shape.kind == "reduced":
                    large = {(i, room): ring for i, site in sites for room, ring in site.made(ROOMS).items()}
                    shipped.large = ShippedIds(large)
            if sum(shipped.rows for shipped in self.shipped) > self._recorder.capacity + REMEMBERED:
                self._take()  # the recorder enforces its capacity, and counts what it drops

    # -- called when samples are read -----------------------------------------------------------------

    def drain(self) -> None:
        """Pass all calls so far to the recorder. Waits for the device."""
        if captures_now():
            return
        with self._lock:
            if self.writes:
                self.ship()
            self._take()

    def collect(self) -> None:
        """Pass the shipped rows to the recorder. Waits for the copies; may run on any thread."""
        for shipped in list(self.shipped):
            shipped.wait()
        with self._lock:
            self._take()

    def _may_read(self) -> bool:
        return self.writes and not is_capturing(self.rings.counters[0].device)

    def _take(self) -> None:
        if not self.shipped:
            return
        new, slots = list(self.shipped), dict[int, int]()
        self.shipped.clear()
        for shipped in new:
            shipped.wait()
            for index in shipped.sites:
                slots[index] = min(shipped.shape.slots, slots.get(index, EXACT))
        segments = self.forwards.segments()
        before, found = list(self._drained), [set[int]() for _ in self._routers]
        seen_by_host = self.forwards.seen_by_host(self._shipped_epoch)
        in_order = sorted(
            (
                (forward, index, row, shipped)
                for shipped in new
                for index, row, forward in shipped.new_rows(self._drained)
            ),
            key=lambda item: item[:2],
        )
        for forward, index, row, shipped in in_order:
            if forward not in found[index]:  # a row may be shipped twice
                found[index].add(forward)
                self._store(shipped, index, row, forward, segments)
        for index, forwards in enumerate(found):
            if forwards:
                self._drained[index] = max(forwards)
                self._count_lost(slots[index], before[index], forwards, seen_by_host)
        self.forwards.forget(min(self._drained), self._shipped_epoch)

    def _store(
        self, shipped: Shipment, index: int, row: int, forward: int, segments: list[tuple[int, Segment]]
    ) -> None:
        header = shipped.headers[row].tolist()
        epoch, code, tokens = self.forwards.full_epoch(int(header[1])), int(header[2]), int(header[3])
        record = CallRecord(
            site=self._routers[index],
            call=self.calls[index],
            step=0,
            phase="forward",
            stage=STAGES[(code >> 1) & 3],
            start_ns=0,
            end_ns=0,
            thread=0,
            profiled=False,
            in_graph=True,
            order=(epoch, forward if code & 1 else 0),
        )
        if code & 1:
            wanted = self.forwards.attribute_to_segment(record, forward, segments)
        else:
            wanted = self.forwards.attribute_to_host(record, epoch)
        if wanted:
            self.calls[index] += 1
            self._recorder.add_reduced(shipped.batch(row, record, tokens))
            if self._recorder.routes is not None:
                self._recorder.routes.add_from_graph(
                    record, shipped.routes(index, row, forward, tokens), tokens
                )

    def _count_lost(self, slots: int, last: int, forwards: set[int], seen_by_host: int) -> None:
        """Count rows overwritten before they were shipped; the rows of the host's forwards never are."""
        span = max(forwards) - last
        if span > slots:
            self._overwritten += max(0, span - len(forwards) - seen_by_host)
