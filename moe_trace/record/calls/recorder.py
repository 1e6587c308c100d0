"""Keep the observed calls until they are reduced in batches on the device; copy the results to the host late.

Nothing here waits for the device until `drain`. The stages of a router call:

    add      references to the router's own tensors, nothing computed            (in the hook)
    reduce   many calls in one batch of kernels -> two small tensors             (after a forward)
    ship     many small tensors -> pinned host memory, asynchronously            (every `SHIP_EVERY` batches)
    drain    wait for pending copies; build `RoutingSample`s                     (on request)

A large forward is reduced when it ends. Small ones (decode steps) are reduced together: their tensors are a
few KB, and one batch of kernels for 32 steps costs as much as one for a single step.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moe_trace.data.schema import OVERHEAD_RANGE, RoutingSample
from moe_trace.find.contracts import RouterOutput
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.calls.free_memory import give_back_memory
from moe_trace.record.calls.inplace_outputs import written_over
from moe_trace.record.calls.pending import PendingCalls, PendingStore, Usual
from moe_trace.record.calls.reduction import reduce_group
from moe_trace.record.calls.refusals import Refusals
from moe_trace.record.calls.samples import Batch
from moe_trace.record.forward.isolation import warn_user
from moe_trace.record.forward.ranges import profiler_is_recording
from moe_trace.record.reduce.streams import copies_on_host, on_stream

_HELD_BYTES_MAX = 64 * 2**20  # router tensors kept alive before an early reduction
# Size beyond which a forward is reduced at once. Reductions stop a model on a CPU; on a device they take a
# millisecond of its host, so host-bound forwards, of up to some 1000 tokens, are deferred.
_WAITING_BYTES_MAX = {"cpu": _HELD_BYTES_MAX, "cuda": 16 * 2**20}
WAITING_CALLS_MAX = 1024
_PENDING_CALLS_MAX = 8 * WAITING_CALLS_MAX  # within one forward, or if no forward of the model ends
SHIP_EVERY = 32
DEFAULT_CAPACITY_BYTES = 256 * 2**20


class Recorder:
    """Bounded store of one tracer's calls. Any thread may add calls; reductions are serialised.

    Args:
        capacity: number of router calls to keep; beyond it the oldest are dropped and counted in
            `overwritten`.
        capacity_bytes: host memory for their metrics, in bytes.
    """

    def __init__(self, *, capacity: int, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        self.capacity, self.capacity_bytes = capacity, capacity_bytes
        self.overwritten = 0
        self.unreduced = 0
        self.may_defer = True
        """Whether small forwards may be deferred; not if a later forward overwrites their tensors."""
        self._lock = threading.RLock()
        self.on_rewritten: Callable[[set[str]], None] | None = None
        """Receives the names of routers whose pending tensors were overwritten; None disables the check."""
        self.routes: Any = None
        """`RoutesRecorder`, if routes are recorded: receives each group of reduced calls."""
        self.refusals = Refusals()
        self._pending = PendingStore()
        self._on_device: list[Batch] = []
        self._on_host: deque[Batch] = deque()
        self._kept = 0
        self._bytes = 0
        """Size of the metrics on the host."""
        refused = {"unreadable": self.refusals.by_router, "unjoined": self.refusals.unjoined}
        self._lost: dict[str, Counter[str]] = defaultdict(Counter, refused)
        """Per reason, lost calls by router."""

    def add(
        self,
        record: CallRecord,
        reading: RouterOutput,
        mask: Tensor | None = None,
        usual: Usual | None = None,
    ) -> None:
        """Keep references to a call's tensors; reduce early if they would keep too much memory alive.

        Args:
            mask: [T] bool, True for padding, if known.
            usual: see `PendingStore.add`.
        """
        with self._lock:  # another thread may be taking them away
            self._pending.add(record, reading, mask, usual=usual)
        self._reduce_if_full()

    def add_forwards(self, *forwards: Any) -> bool:
        """Keep references to the tensors of forwards: see `PendingStore.add_forwards`."""
        with self._lock:
            kept = self._pending.add_forwards(*forwards)
        self._reduce_if_full()
        return kept

    def _reduce_if_full(self) -> None:
        if self._pending.held_bytes > _HELD_BYTES_MAX or self._pending.calls > _PENDING_CALLS_MAX:
            self.reduce()

    def end_forward(self) -> None:
        """Reduce the forward that has ended, or defer it if it is small."""
        pending = self._pending
        if not pending.calls:  # as in every forward that is not recorded
            return
        small = pending.calls <= WAITING_CALLS_MAX and pending.held_bytes <= _WAITING_BYTES_MAX.get(
            pending.device_type, 0
        )
        if not (small and self.may_defer):
            self.reduce()

    def lost_of(self, name: str) -> Counter[str]:
        """Return the calls of a router that were lost here, by reason."""
        return Counter({reason: lost[name] for reason, lost in self._lost.items() if lost[name]})

    def reduce(self) -> None:
        """Reduce all pending calls on their devices, without waiting."""
        if not self._pending.calls:
            return
        with self._lock, torch.no_grad():
            overhead = (
                torch.profiler.record_function(OVERHEAD_RANGE) if profiler_is_recording() else nullcontext()
            )
            with overhead:
                for group in self._intact(self._pending.take()):
                    self._reduce_or_count(group)

    def _intact(self, groups: list[PendingCalls]) -> Iterator[PendingCalls]:
        """Return groups of one form each, less overwritten calls, which are counted."""
        overwritten: list[set[int]] = [set()] * len(groups)
        if self.on_rewritten is not None:
            overwritten = written_over(groups)
        for group, calls in zip(groups, overwritten, strict=True):
            if calls:
                names = [record.site.name for i, record in enumerate(group.records) if i in calls]
                self._lost["rewritten"].update(names)
                self.on_rewritten(set(names))  # type: ignore[misc]
            if calls or not group.is_uniform:
                yield from group.without(calls)
            else:
                yield group

    def _reduce_or_count(self, group: PendingCalls) -> None:
        """Reduce a group, or count its calls as unreduced: no error may stop the user's forward."""
        memory = _allocated_bytes(group.index[0].device)
        try:
            with on_stream(group.index[0], group.stream):
                batch = reduce_group(group)
                batch.memory_bytes = memory
                self.add_reduced(batch)
                if self.routes is not None:
                    self.routes.take(group)
        except Exception as error:
            self._count_unreduced([record.site.name for record in group.records], error)

    def _count_unreduced(self, names: list[str], error: Exception) -> None:
        with self._lock:
            self._lost["unreduced"].update(names)
            first, self.unreduced = self.unreduced == 0, self.unreduced + len(names)
        if first and names:
            warn_user(
                f"{len(names)} router calls of {names[0]} could not be reduced "
                f"({type(error).__name__}: {error}); they are counted as lost, and the model runs on"
            )

    def add_reduced(self, batch: Batch) -> None:
        if batch.ints.device.type == "meta":
            raise ValueError("the router ran on the meta device, where there are no values")
        with self._lock:
            self._kept += len(batch.records)
            if batch.ints.device.type == "cuda":
                self._on_device.append(batch)
                if len(self._on_device) >= SHIP_EVERY:
                    self._ship()
            else:
                batch.to_numpy()
                self._bytes += batch.nbytes
                self._on_host.append(batch)
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Drop calls beyond the capacity; batches are in order of time, those on the device last."""
        while self._kept > self.capacity or (self._bytes > self.capacity_bytes and self._on_host):
            oldest = self._on_host[0] if self._on_host else self._on_device[0]
            calls = len(oldest.records)
            excess = self._kept - self.capacity
            if excess <= 0:  # by bytes: as many calls as hold the excess
                excess = -(-(self._bytes - self.capacity_bytes) * calls // max(1, oldest.nbytes))
            dropped = min(max(1, excess), calls)
            lost = (record for record in islice(oldest.records, dropped) if not self.refusals.counted(record))
            names = (record.site.name for record in lost)
            self._lost["overwritten"].update(names)
            before = oldest.nbytes
            oldest.drop(dropped)
            if self._on_host:
                self._bytes -= before - oldest.nbytes
            if not len(oldest.records):
                self._on_host.popleft() if self._on_host else self._on_device.pop(0)
            self._kept -= dropped
            self.overwritten += dropped

    def _ship(self) -> None:
        """Start copying all batches on a device to pinned host memory."""
        if self.routes is not None:
            self.routes.ship()
        for batch in self._on_host:
            if batch.copied is not None and batch.copied.query():  # free its pinned memory, which is scarce
                before = batch.nbytes
                batch.to_numpy()
                self._bytes += batch.nbytes - before
        groups: dict[Any, list[Batch]] = defaultdict(list)
        for batch in self._on_device:
            groups[batch.ints.device, batch.ints.shape[1], batch.stream].append(batch)
        for (device, _, stream), batches in groups.items():
            with torch.cuda.device(device), on_stream(batches[0].ints, stream), torch.no_grad():
                combined = [torch.cat([b.ints for b in batches]), torch.cat([b.floats for b in batches])]
                (ints, floats), copied = copies_on_host(combined)
            start = 0
            for batch in batches:
                rows = slice(start, start := start + len(batch.records))
                batch.ints, batch.floats, batch.copied = ints[rows], floats[rows], copied
        self._bytes += sum(batch.nbytes for batch in self._on_device)
        self._on_host.extend(self._on_device)
        self._on_device.clear()
        self._drop_oldest()

    def drain(self, since_step: int = 0) -> list[RoutingSample]:
        """Return the samples kept since a step, oldest first. Waits for the device; nothing is removed."""
        with self._lock:
            self.reduce()
            give_back_memory(sum(len(batch.records) * batch.num_experts for batch in self._on_host))
            self._ship()
            pairs = [
                pair
                for batch in self._on_host
                if batch.records.last_step >= since_step
                for pair in self._samples(batch)
                if pair[0].step >= since_step
            ]
        pairs.sort(key=lambda pair: (pair[0].order, pair[1].host_start_ns))
        samples = [sample for _, sample in pairs]
        if any(record.in_graph for record, _ in pairs):
            return list(_renumbered(samples, self._lost["overwritten"]))
        return samples

    def take(self, *, reduce: bool = True) -> list[Any]:
        """Remove all kept calls without waiting for the device; `samples_of` converts them to samples."""
        with self._lock:
            if reduce:
                self.reduce()
                self._ship()
            batches = list(self._on_host)
            self._on_host.clear()
            self._kept -= sum(len(batch.records) for batch in batches)
            self._bytes = 0
        return batches

    def samples_of(self, batches: list[Any]) -> list[RoutingSample]:
        """Return the samples of what `take` removed. Waits for the copies."""
        return [sample for batch in batches for _, sample in self._samples(batch)]

    def _samples(self, batch: Batch) -> list[tuple[CallRecord, RoutingSample]]:
        """Return the samples of one batch; if it cannot be read, count its calls and go on."""
        try:
            return self.refusals.leave_out(batch.records, batch.to_samples())
        except Exception as error:
            self._count_unreduced([record.site.name for record in batch.records], error)
            batch.drop(len(batch.records))
            return []


def _renumbered(samples: list[RoutingSample], dropped: Counter[str]) -> Iterator[RoutingSample]:
    """Number calls in order of time: calls in graphs were numbered when they were drained."""
    calls = Counter(dropped)
    for sample in samples:
        call = calls[sample.name]
        calls[sample.name] += 1
        yield sample if sample.call == call else replace(sample, call=call)


def _allocated_bytes(device: torch.device) -> int | None:
    # `torch.cuda.memory_allocated` spends over 100 us on flattening unused statistics.
    figures: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(device) if device.type == "cuda" else {}
    return figures.get("allocated_bytes", {}).get("all", {}).get("current")
