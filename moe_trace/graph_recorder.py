"""Decisions that were made inside compiled code and CUDA graphs: from the rings to `RoutingSample`s.

    write    plain tensor work that becomes part of the graph                     (graph_ring.py)
    ship     all rings reduced in one batch of kernels, copied asynchronously     (before a ring is full)
    drain    wait; attribute each row to its forward and step; hand it to the recorder

A forward that the host saw begin (its hook ran eagerly) has that forward's step and time. One that it did
not see, because its hook was compiled or is replayed, is only counted, by the device; marks tell its step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.call_record import CallRecord
from moe_trace.contracts import Reading
from moe_trace.graph_memory import captures_now, is_capturing, keep_for_graphs, outside_graphs
from moe_trace.graph_ring import (
    EXACT,
    STAGES,
    ForwardCounter,
    GraphRing,
    RingKind,
    RingShape,
    reduce_rings,
    ring_kind,
    unpad,
)
from moe_trace.recorder import Recorder, copy_to_pinned
from moe_trace.routers import RouterSite
from moe_trace.schema import GraphMark, Stage

_MARKS_IN_TRACES = 10_000  # more steps than a trace can hold
_REMEMBERED = 100_000  # forwards and marks whose step is remembered until they are drained


@dataclass(slots=True)
class HostForward:
    """A forward that the host saw begin."""

    step: int
    stage: Stage
    start_ns: int
    thread: int
    profiled: bool
    sampled: bool
    """Whether its decisions are wanted: `every` and `warmup` cannot stop a compiled write."""


@dataclass(slots=True)
class Segment:
    """Forwards that the host did not see, up to a mark."""

    step: int | None
    """None where a step is one forward."""
    profiled: bool
    sampled: bool


@dataclass(slots=True)
class _Mark:
    segment: Segment
    state: Tensor
    copied: torch.cuda.Event | None
    start_ns: int
    end_ns: int
    seen: int
    thread: int

    def passed(self) -> bool:
        return self.copied is None or self.copied.query()

    def forwards(self) -> int:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return int(self.state)

    def as_data(self) -> GraphMark:
        """What placing needs of it. Waits for the copy."""
        return GraphMark(
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            thread=self.thread,
            forwards=self.forwards(),
            seen=self.seen,
        )


@dataclass(slots=True)
class _Shipped:
    """The rings of one shape, reduced."""

    shape: RingShape
    sites: list[int]
    headers: Tensor
    ints: Tensor
    floats: Tensor
    copied: torch.cuda.Event | None

    @property
    def rows(self) -> int:
        return len(self.headers)


class SiteRings:
    """The rings of one router; each is made when a call that needs it is traced or captured.

    `write` runs inside other people's graphs: nothing but tensor work, and attributes that are the same for
    all routers of a model, so that layers may share their compiled code.
    """

    def __init__(self, num_experts: int, allocate: Callable[[SiteRings, RingKind, int, int], None]) -> None:
        self.num_experts = num_experts
        self.small: GraphRing | None = None
        self.medium: GraphRing | None = None
        self.reduced: GraphRing | None = None
        self.misreads = False
        self.traced = False
        """Whether a compiler traced it, rather than a stream captured it."""
        self._allocate = allocate

    @torch._dynamo.assume_constant_result
    def prepare(self, kind: RingKind, top_k: int, classes: int) -> int:
        """Runs while tracing, never in the graph."""
        self.traced |= not captures_now()
        if getattr(self, kind) is None:
            self._allocate(self, kind, top_k, classes)
        return 0

    @torch._dynamo.assume_constant_result
    def misread(self) -> int:
        """A call has another form than its contract expects; runs while tracing, never in the graph."""
        self.misreads = True
        return 0

    def write(self, reading: Reading) -> None:
        """Put a decision into the slot of the forward under way."""
        tokens, top_k = reading.index_TK.shape
        classes = 0 if reading.logits_TE is None else reading.logits_TE.shape[-1]
        kind = ring_kind(tokens)
        self.prepare(kind, top_k, classes)
        if kind == "small":
            self.small.write_raw(reading)  # type: ignore[union-attr]
        elif kind == "medium":
            self.medium.write_raw(reading)  # type: ignore[union-attr]
        else:
            self.reduced.write_reduced(reading)  # type: ignore[union-attr]

    def write_captured(self, reading: Reading) -> None:
        """The same while a stream is captured into a graph, whose replays will write."""
        with torch.no_grad():
            self.write(reading)
        keep_for_graphs([memory for ring in self.all() for memory in (ring.data, *ring.counter.memory)])

    def all(self) -> Iterator[GraphRing]:
        yield from (ring for ring in (self.small, self.medium, self.reduced) if ring is not None)


class GraphRecorder:
    """All rings of one tracer, and what the host knows of the forwards that wrote into them.

    Args:
        started: called while tracing or capturing, when the first ring is made.
        forwards: returns how many forwards the host has seen.
        samples_step: whether the decisions of a step are wanted.
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        recorder: Recorder,
        *,
        started: Callable[[], None],
        forwards: Callable[[], int],
        samples_step: Callable[[int], bool],
    ) -> None:
        self.sites = [SiteRings(site.info.num_experts, self._allocate) for site in sites]
        self.epoch = 0
        self.overwritten = 0
        self.calls = [0] * len(sites)
        """Calls drained so far, by router."""
        self._routers = list(sites)
        self._recorder = recorder
        self._started = started
        self._forwards = forwards
        self._samples_step = samples_step
        self._lock = threading.RLock()
        self._counters: list[ForwardCounter] = []
        self._latest: HostForward | None = None
        self._epochs: dict[int, HostForward] = {}
        self._marks: deque[_Mark] = deque(maxlen=_REMEMBERED)
        self._profiled_marks: deque[_Mark] = deque(maxlen=_MARKS_IN_TRACES)
        """Those that stand in a trace."""
        self._shipped: deque[_Shipped] = deque()
        self._unshipped = 0
        self._shipped_at = 0
        self._drained = [0] * len(sites)

    @property
    def writes(self) -> bool:
        """Whether any graph writes into a ring."""
        return bool(self._counters)

    @property
    def compiled(self) -> bool:
        """Whether a compiler made any of these graphs."""
        return any(site.traced for site in self.sites)

    def marks(self) -> tuple[GraphMark, ...]:
        """The marks that were set while a profiler recorded. Waits for their copies."""
        with self._lock:
            return tuple(mark.as_data() for mark in self._profiled_marks)

    # -- while tracing or capturing -------------------------------------------------------------------

    @torch._dynamo.assume_constant_result
    def prepare(self) -> int:
        """Make the counters; runs while tracing, never in the graph."""
        if not self._counters:
            for device in {_device(site): None for site in self._routers}:
                self._counter(device)
            self._drained = [self._forwards()] * len(self.sites)
        self._started()
        return 0

    def start_in_graph(self, stage_code: int) -> None:
        """The model's forward begins, inside a graph."""
        self.prepare()
        for counter in self._counters:
            counter.start_in_graph(stage_code)

    def start_captured(self, stage_code: int) -> None:
        """The same while a stream is captured into a graph."""
        with torch.no_grad():
            self.start_in_graph(stage_code)
        keep_for_graphs([memory for counter in self._counters for memory in counter.memory])

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
        for counter in self._counters:
            if counter.device == device:
                return counter
        with outside_graphs(device):
            counter = ForwardCounter(device, forwards=self._forwards(), epoch=self.epoch)
        self._counters.append(counter)
        if self._latest is not None:  # the forward under way is the first that writes
            self._epochs[self.epoch] = self._latest
            self._unshipped = 1
        self._drained = [self._forwards() - 1] * len(self.sites)
        return counter

    # -- on the host ----------------------------------------------------------------------------------

    def start_on_host(self, forward: HostForward) -> None:
        """The model's forward begins, and its hook runs eagerly. Ships the rings before they are full."""
        self.epoch += 1
        self._latest = forward
        if not self._counters:
            return
        self._epochs[self.epoch] = forward
        if len(self._epochs) > _REMEMBERED:
            del self._epochs[next(iter(self._epochs))]
        if self._unshipped >= self._slots():
            self.ship()
        self._unshipped += 1
        with torch.no_grad():
            for counter in self._counters:
                counter.start_on_host(self.epoch, forward.stage)

    def mark(self, segment: Segment, *, in_trace: bool) -> None:
        """All forwards since the last mark belong to `segment`; nothing waits.

        Args:
            in_trace: a profiler records, so that the copy of the count will stand in its trace.
        """
        if not self._counters or is_capturing(self._counters[0].device):
            return
        with self._lock:
            start_ns = time.time_ns()
            state, copied = _to_host([self._counters[0].forwards])
            end_ns, thread = time.time_ns(), threading.get_native_id()
            mark = _Mark(segment, state[0], copied, start_ns, end_ns, self._forwards(), thread)
            self._marks.append(mark)
            if in_trace:
                self._profiled_marks.append(mark)
            passed = [mark for mark in self._marks if mark.copied is None or mark.passed()]
            known = passed[-1].forwards() if passed else 0
            if known - self._shipped_at >= max(1, self._slots() // 2):
                self._shipped_at = known
                self.ship()

    def _slots(self) -> int:
        """Forwards after which the first slot of some ring is written again."""
        return min((ring.slots for site in self.sites for ring in site.all()), default=1)

    def ship(self) -> None:
        """Reduce all rings and start their copies to the host; nothing waits."""
        groups: dict[RingShape, list[int]] = {}
        for index, site in enumerate(self.sites):
            for ring in site.all():
                groups.setdefault(ring.shape, []).append(index)
        with self._lock, torch.no_grad():
            self._unshipped = 0
            for shape, indices in groups.items():
                rings = [getattr(self.sites[index], shape.kind) for index in indices]
                headers, stats = reduce_rings(rings)
                host, copied = _to_host([headers, stats.ints, stats.floats])
                self._shipped.append(_Shipped(shape, indices, host[0], host[1], host[2], copied))
            if sum(shipped.rows for shipped in self._shipped) > self._recorder.capacity + _REMEMBERED:
                self._take()  # the recorder keeps to its capacity, and counts what it drops

    def drain(self) -> None:
        """Hand every decision made so far to the recorder. Waits for the device."""
        if not self._counters or is_capturing(self._counters[0].device):
            return
        with self._lock:
            self.ship()
            self._take()

    def collect(self) -> None:
        """Hand what was shipped to the recorder. Waits for the copies; may run on any thread."""
        for shipped in list(self._shipped):
            if shipped.copied is not None:
                shipped.copied.synchronize()
        with self._lock:
            self._take()

    # -- attribution ----------------------------------------------------------------------------------

    def _take(self) -> None:
        new = [_NewRows(shipped, self._drained) for shipped in self._shipped]
        self._shipped.clear()
        bounds = [(mark.forwards(), mark.segment) for mark in self._marks]
        before, found = list(self._drained), [set[int]() for _ in self.sites]
        seen_by_host = len(self._epochs)
        in_order = sorted(
            ((forward, index, row, rows) for rows in new for index, row, forward in rows.each()),
            key=lambda item: item[:2],
        )
        for forward, index, row, rows in in_order:
            if forward not in found[index]:  # else shipped twice
                found[index].add(forward)
                self._store(rows, index, row, forward, bounds)
        for index, forwards in enumerate(found):
            if forwards:
                self._drained[index] = max(forwards)
                self._count_lost(index, before[index], forwards, seen_by_host)
        self._epochs = {epoch: seen for epoch, seen in self._epochs.items() if epoch == self.epoch}
        oldest = min(self._drained)
        while self._marks and self._marks[0].forwards() < oldest:
            self._marks.popleft()

    def _store(
        self, rows: _NewRows, index: int, row: int, forward: int, bounds: list[tuple[int, Segment]]
    ) -> None:
        header = rows.headers[row]
        epoch, code, tokens = self._unwrap_epoch(int(header[1])), int(header[2]), int(header[3])
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
            padding_T=None,
            in_graph=True,
            order=(epoch, 0),
        )
        if code & 1:
            wanted = self._attribute_to_segment(record, epoch, forward, bounds)
        else:
            wanted = self._attribute_to_host(record, epoch)
        if wanted:
            self.calls[index] += 1
            ints, shape = rows.ints[row : row + 1].clone(), rows.shape
            unpad(shape, ints, tokens)
            self._recorder.add_reduced(
                [record],
                ints=ints,
                floats=rows.floats[row : row + 1],
                tokens=tokens,
                top_k=shape.top_k,
                num_experts=shape.num_experts,
                classes=shape.classes,
            )

    def _attribute_to_segment(
        self, record: CallRecord, epoch: int, forward: int, bounds: list[tuple[int, Segment]]
    ) -> bool:
        record.order, record.graph_forward = (epoch, forward), forward
        segment = next((s for end, s in bounds if forward <= end), None)
        if segment is None:
            return False
        record.step = forward - 1 if segment.step is None else segment.step
        record.profiled = segment.profiled
        return segment.sampled and (segment.step is not None or self._samples_step(record.step))

    def _attribute_to_host(self, record: CallRecord, epoch: int) -> bool:
        seen = self._epochs.get(epoch)
        if seen is None:
            self.overwritten += 1
            return False
        record.step, record.stage = seen.step, seen.stage
        record.start_ns = record.end_ns = seen.start_ns
        record.thread, record.profiled = seen.thread, seen.profiled
        return seen.sampled

    def _unwrap_epoch(self, epoch: int) -> int:
        return self.epoch - (self.epoch - epoch) % EXACT

    def _count_lost(self, index: int, last: int, forwards: set[int], seen_by_host: int) -> None:
        """Rows written over before anybody shipped them; the host's forwards are shipped in time."""
        span = max(forwards) - last
        slots = min(ring.slots for ring in self.sites[index].all())
        if span > slots:
            self.overwritten += max(0, span - len(forwards) - seen_by_host)


class _NewRows:
    """The rows of one shipment that were not drained before, on the host."""

    def __init__(self, shipped: _Shipped, drained: Sequence[int]) -> None:
        if shipped.copied is not None:
            shipped.copied.synchronize()
        self.shape, self._sites, self._drained = shipped.shape, shipped.sites, drained
        self.headers = shipped.headers.numpy()
        self.ints, self.floats = shipped.ints, shipped.floats

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(router, row, forward number), in order of the forwards of each router."""
        slots = self.shape.slots
        for position, index in enumerate(self._sites):
            part = self.headers[position * slots : (position + 1) * slots]
            last = self._drained[index]
            ahead = (part[:, 0].astype(np.int64) - last) % EXACT
            new = np.flatnonzero((part[:, 3] > 0) & (ahead > 0) & (ahead < EXACT // 2))
            for row in new[np.argsort(ahead[new], kind="stable")]:
                yield index, position * slots + int(row), last + int(ahead[row])


def _device(site: RouterSite) -> torch.device:
    """Where the router's weights are, which is where its decision is made."""
    for tensor in (*site.router.parameters(), *site.router.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


_CPU = torch.device("cpu")


def _to_host(tensors: Sequence[Tensor]) -> tuple[list[Any], torch.cuda.Event | None]:
    """Copies on the host, complete once the event has passed."""
    if tensors[0].device.type != "cuda":
        return [tensor.clone() for tensor in tensors], None
    with torch.cuda.device(tensors[0].device), torch.no_grad():
        copies = [copy_to_pinned(tensor) for tensor in tensors]
        copied = torch.cuda.Event()
        copied.record()
    return copies, copied
