"""Keep what the hooks saw until it can be reduced, in batches, on the device; bring it to the host late.

Nothing here waits for the device until `drain`. The way of one router call:

    add      references to the router's own tensors, nothing computed            (in the hook)
    reduce   many calls in one batch of kernels -> two small tensors             (after a forward)
    ship     many small tensors -> pinned host memory, asynchronously            (every `_SHIP_EVERY` batches)
    drain    wait for what is under way; build `RoutingSample`s                  (when somebody asks)

A large forward is reduced when it ends. Small ones (decode steps) wait for each other: their tensors are
a few KB, and one batch of kernels for 32 steps costs what one for a single step would.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.contracts import Reading
from moe_trace.ranges import profiler_is_recording
from moe_trace.routers import RouterSite
from moe_trace.schema import OWN_WORK_RANGE, Phase, RouterInfo, RoutingSample, Stage
from moe_trace.stats import FLOAT_FIELDS, PackedStats, routing_stats
from moe_trace.streams import on_stream, stream_of_now

_HELD_BYTES_MAX = 64 * 2**20  # router tensors kept alive before a batch is reduced early
# ... and beyond which a forward does not wait for the next ones. On a CPU the reduction would stop the model
# for as long as it takes, so it waits while memory allows; a device works through it beside the host.
_WAITING_BYTES_MAX = {"cpu": _HELD_BYTES_MAX, "cuda": 2 * 2**20}
_WAITING_CALLS_MAX = 1024
# Logits of one batch. On a device this bounds the scratch memory to about 3 x 64 MiB; on a CPU a batch that
# fits its cache takes half the time of one that does not.
_REDUCED_ELEMENTS_MAX = {"cpu": 2**17, "cuda": 2**24}
_SHIP_EVERY = 32


@dataclass(slots=True)
class CallRecord:
    """One router call, before its figures are known."""

    site: RouterSite
    call: int
    step: int
    phase: Phase
    stage: Stage
    start_ns: int
    end_ns: int
    thread: int
    profiled: bool
    padding_T: Tensor | None
    memory_bytes: int | None = None
    order: tuple[int, int] = (0, 0)
    """Forwards that the host saw before it, and how many that it did not see since: they have no time."""
    in_graph: bool = False


@dataclass(slots=True)
class _Pending:
    record: CallRecord
    reading: Reading
    stream: int
    """On which its tensors are made: elsewhere they might be read too early."""


@dataclass(slots=True)
class _Batch:
    """Calls reduced together; `stats` moves from the device to pinned memory to numpy."""

    records: list[CallRecord]
    top_k: int
    tokens: int
    num_experts: int
    classes: int
    """Logits per token, which may be more than the experts; 0 without true logits."""
    ints: Any
    floats: Any
    stream: int = 0
    copied: torch.cuda.Event | None = None
    samples: list[RoutingSample] | None = None

    def drop(self, count: int) -> None:
        """Forget the first calls."""
        del self.records[:count]
        self.ints, self.floats = self.ints[count:], self.floats[count:]
        if self.samples is not None:
            del self.samples[:count]


class Recorder:
    """Bounded store of the calls of one tracer. Any thread may add; reductions are serialised.

    Args:
        capacity: router calls kept; beyond it the oldest are dropped and counted in `overwritten`.
    """

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self.overwritten = 0
        self.unreduced = 0
        self.may_wait = True
        """Whether small forwards may wait for each other; not where a later one overwrites their tensors."""
        self._lock = threading.RLock()
        self._pending: list[_Pending] = []
        self._unfinished = 0
        self._held_bytes = 0
        self._on_device: list[_Batch] = []
        self._on_host: deque[_Batch] = deque()
        self._kept = 0
        self._dropped: Counter[str] = Counter()

    def add(self, record: CallRecord, reading: Reading) -> None:
        """Keep references to the call's tensors; reduce early if too much would be kept alive."""
        pending, held = _Pending(record, reading, stream_of_now(reading.index_TK)), _held_bytes(reading)
        with self._lock:  # another thread may be taking the list away
            self._pending.append(pending)
            self._held_bytes += held
            full = self._held_bytes > _HELD_BYTES_MAX
        if full:
            self.reduce()

    def end_forward(self) -> None:
        """The model's forward is over: reduce it now, or let it wait for more if it is small."""
        with self._lock:
            fresh = self._pending[self._unfinished :]
            if fresh:
                memory = _allocated_bytes(fresh[0].reading.index_TK.device)
                for item in fresh:
                    item.record.memory_bytes = memory
            small = self._held_bytes <= self._waiting_bytes() and len(self._pending) <= _WAITING_CALLS_MAX
            if not (small and self.may_wait):
                self.reduce()
                return
            for item in fresh:
                let_graph_go(item.reading)
            self._unfinished = len(self._pending)

    def _waiting_bytes(self) -> int:
        device = self._pending[0].reading.index_TK.device.type if self._pending else "cpu"
        return _WAITING_BYTES_MAX.get(device, 0)

    def reduce(self) -> None:
        """Reduce all pending calls on their devices, without waiting for any."""
        if not self._pending:
            return
        with self._lock, torch.no_grad():
            pending, self._pending = self._pending, []
            self._held_bytes = self._unfinished = 0
            with _own_work_range():
                for group in _groups_of_one_shape(pending):
                    self._reduce_or_count(group)

    def _reduce_or_count(self, group: list[_Pending]) -> None:
        """Reduce a group; what cannot be reduced is counted, and never stops the user's forward."""
        try:
            with on_stream(group[0].reading.index_TK, group[0].stream):
                self._store(_reduce_group(group))
        except Exception as error:
            self.unreduced += len(group)
            if self.unreduced == len(group):
                warnings.warn(
                    f"{len(group)} router calls of {group[0].record.site.name} could not be reduced "
                    f"({type(error).__name__}: {error}); they are counted as lost, and the model runs on",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _store(self, batch: _Batch) -> None:
        self._kept += len(batch.records)
        if batch.ints.device.type == "cuda":
            self._on_device.append(batch)
            if len(self._on_device) >= _SHIP_EVERY:
                self._ship()
        else:
            self._on_host.append(batch)
        self._drop_oldest(self._kept - self.capacity)

    def add_reduced(
        self,
        records: list[CallRecord],
        ints: Tensor,
        floats: Tensor,
        *,
        tokens: int,
        top_k: int,
        num_experts: int,
        classes: int,
    ) -> None:
        """Keep calls whose figures are on the host already."""
        with self._lock:
            self._store(_Batch(records, top_k, tokens, num_experts, classes, ints, floats))

    def _drop_oldest(self, count: int) -> None:
        """Make room; batches stand in order of time, those still on the device last."""
        while count > 0:
            oldest = self._on_host[0] if self._on_host else self._on_device[0]
            dropped = min(count, len(oldest.records))
            self._dropped.update(record.site.name for record in oldest.records[:dropped])
            oldest.drop(dropped)
            if not oldest.records:
                self._on_host.popleft() if self._on_host else self._on_device.pop(0)
            count -= dropped
            self._kept -= dropped
            self.overwritten += dropped

    def _ship(self) -> None:
        """Start the copies of all batches on a device to pinned host memory."""
        for batch in self._on_host:
            _unpin_if_copied(batch)
        for device, batches in _by_device_and_width(self._on_device):
            with torch.cuda.device(device), on_stream(batches[0].ints, batches[0].stream), torch.no_grad():
                ints = copy_to_pinned(torch.cat([b.ints for b in batches]))
                floats = copy_to_pinned(torch.cat([b.floats for b in batches]))
                copied = torch.cuda.Event()
                copied.record()
            start = 0
            for batch in batches:
                rows = slice(start, start := start + len(batch.records))
                batch.ints, batch.floats, batch.copied = ints[rows], floats[rows], copied
        self._on_host.extend(self._on_device)
        self._on_device.clear()

    def drain(self) -> list[RoutingSample]:
        """All samples kept so far, oldest first. Waits for the device; nothing is removed."""
        with self._lock:
            self.reduce()
            self._ship()
            pairs = [
                pair for batch in self._on_host for pair in zip(batch.records, _samples(batch), strict=True)
            ]
        pairs.sort(key=lambda pair: (pair[0].order, pair[1].host_start_ns))
        samples = [sample for _, sample in pairs]
        if any(record.in_graph for record, _ in pairs):
            return list(_renumbered(samples, self._dropped))
        return samples

    def take(self, *, reduce: bool = True) -> list[Any]:
        """Remove all that is kept, without waiting for the device; `samples_of` turns it into samples."""
        with self._lock:
            if reduce:
                self.reduce()
                self._ship()
            batches = list(self._on_host)
            self._on_host.clear()
            self._kept -= sum(len(batch.records) for batch in batches)
        return batches

    @staticmethod
    def samples_of(batches: list[Any]) -> list[RoutingSample]:
        """What `take` removed. Waits for the copies."""
        return [sample for batch in batches for sample in _samples(batch)]

    def clear(self) -> None:
        """Forget everything recorded."""
        with self._lock:
            self._pending.clear()
            self._unfinished = 0
            self._on_device.clear()
            self._on_host.clear()
            self._held_bytes = self._kept = self.overwritten = 0


def _renumbered(samples: list[RoutingSample], dropped: Counter[str]) -> Iterator[RoutingSample]:
    """Calls counted in order of time: those in graphs got their numbers when they were drained."""
    calls = Counter(dropped)
    for sample in samples:
        call = calls[sample.name]
        calls[sample.name] += 1
        yield sample if sample.call == call else replace(sample, call=call)


def _own_work_range() -> Any:
    if profiler_is_recording():
        return torch.profiler.record_function(OWN_WORK_RANGE)
    return _NO_RANGE


class _NoRange:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NO_RANGE = _NoRange()


def _held_bytes(reading: Reading) -> int:
    tensors = (reading.index_TK, reading.weights_TK, reading.logits_TE)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def let_graph_go(reading: Reading) -> None:
    """Keep the values only: a tensor with a history would keep the forward's activations alive."""
    if reading.weights_TK.requires_grad:
        reading.weights_TK = reading.weights_TK.detach()
    if reading.logits_TE is not None and reading.logits_TE.requires_grad:
        reading.logits_TE = reading.logits_TE.detach()


def _groups_of_one_shape(pending: Sequence[_Pending]) -> Iterator[list[_Pending]]:
    """Calls that one batch of kernels can take: same shapes, types and device."""
    groups: dict[Any, list[_Pending]] = {}
    for item in pending:
        groups.setdefault(_shape_key(item), []).append(item)
    for group in groups.values():
        logits = group[0].reading.logits_TE
        elements = max(1, (logits if logits is not None else group[0].reading.index_TK).numel())
        limit = _REDUCED_ELEMENTS_MAX.get(group[0].reading.index_TK.device.type, 2**24)
        size = max(1, limit // elements)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _shape_key(item: _Pending) -> Any:
    reading = item.reading
    index, weights, logits = reading.index_TK, reading.weights_TK, reading.logits_TE
    return (
        item.stream,
        index.shape,
        index.device,
        index.dtype,
        weights.dtype,
        None if logits is None else (logits.shape, logits.dtype),
        item.record.site.info.num_experts,
        item.record.padding_T is None,
    )


def _reduce_group(group: list[_Pending]) -> _Batch:
    first = group[0]
    logits = first.reading.logits_TE
    tokens, top_k = first.reading.index_TK.shape
    num_experts = first.record.site.info.num_experts or (logits.shape[-1] if logits is not None else 0)
    padding = first.record.padding_T
    stats: PackedStats = routing_stats(
        None if logits is None else _stack([p.reading.logits_TE for p in group]),
        _stack([p.reading.weights_TK for p in group]),
        _stack([p.reading.index_TK for p in group]),
        num_experts,
        None if padding is None else _padding([p.record.padding_T for p in group], first.reading.index_TK),
    )
    for item in group:
        item.record.padding_T = None
    return _Batch(
        records=[p.record for p in group],
        top_k=top_k,
        tokens=tokens,
        num_experts=num_experts,
        classes=0 if logits is None else logits.shape[-1],
        ints=stats.ints,
        floats=stats.floats,
        stream=first.stream,
    )


def _padding(masks: list[Any], like: Tensor) -> Tensor:
    """The mask stands where the model's input is; with a device map its later layers are elsewhere."""
    return _stack([mask.to(like.device, non_blocking=True) for mask in masks])


def _stack(tensors: list[Any]) -> Tensor:
    return tensors[0].detach().unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _allocated_bytes(device: torch.device) -> int | None:
    """As `torch.cuda.memory_allocated`, which spends over 100 us on flattening figures that nobody reads."""
    if device.type != "cuda":
        return None
    try:
        return int(torch._C._cuda_memoryStats(device.index)["allocated_bytes"]["all"]["current"])
    except (AttributeError, KeyError, TypeError):  # private, so it may change
        return torch.cuda.memory_allocated(device)


def _by_device_and_width(batches: list[_Batch]) -> Iterator[tuple[torch.device, list[_Batch]]]:
    groups: dict[Any, list[_Batch]] = {}
    for batch in batches:
        groups.setdefault((batch.ints.device, batch.ints.shape[1], batch.stream), []).append(batch)
    for (device, _, _), group in groups.items():
        yield device, group


def copy_to_pinned(source: Tensor) -> Tensor:
    """An asynchronous copy; complete once the current stream has passed it."""
    # The device is named, because a default device set by the user would be taken otherwise.
    target = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return target.copy_(source, non_blocking=True)


def _unpin_if_copied(batch: _Batch) -> None:
    """Move a finished copy out of pinned memory, which is scarce."""
    if batch.copied is not None and batch.copied.query():
        _to_numpy(batch)


def _to_numpy(batch: _Batch) -> None:
    if isinstance(batch.ints, Tensor):
        if batch.copied is not None:
            batch.copied.synchronize()
        batch.ints = batch.ints.cpu().numpy().copy()
        batch.floats = batch.floats.cpu().numpy().copy()
        batch.copied = None


def _samples(batch: _Batch) -> list[RoutingSample]:
    if batch.samples is None:
        _to_numpy(batch)
        rows = zip(batch.records, batch.ints, batch.floats, strict=True)
        batch.samples = [_sample(batch, record, ints, floats) for record, ints, floats in rows]
    return batch.samples


def _sample(batch: _Batch, record: CallRecord, ints: np.ndarray, sums: np.ndarray) -> RoutingSample:
    experts, k = batch.num_experts, batch.top_k
    assignments = ints[:experts]
    zero_weight, out_of_range = int(ints[experts]), int(ints[experts + 1])
    k_histogram = ints[experts + 2 : experts + 3 + k]
    padding, finite = int(ints[experts + 3 + k]), int(ints[experts + 4 + k])
    info = record.site.info
    computed = _computed_slots(info, batch.tokens, assignments, zero_weight)
    means = _means(sums, finite, batch.classes) if batch.classes else dict.fromkeys(_MEANS)
    return RoutingSample(
        site=info.site,
        name=info.name,
        layer=info.layer,
        call=record.call,
        step=record.step,
        phase=record.phase,
        stage=record.stage,
        tokens=batch.tokens,
        top_k=k,
        assignments=assignments,
        skipped=zero_weight + out_of_range,
        computed_slots=computed,
        padding_assignments=padding,
        nonfinite_tokens=batch.tokens - finite if batch.classes else 0,
        k_histogram=k_histogram,
        router_flops=info.router_flops_per_token * batch.tokens,
        expert_flops=info.expert_flops_per_slot * computed,
        memory_allocated_bytes=record.memory_bytes,
        host_start_ns=record.start_ns,
        host_end_ns=record.end_ns,
        thread=record.thread,
        profiled=record.profiled,
        aux_loss=_aux_loss(batch, sums, finite),
        in_graph=record.in_graph,
        **means,
    )


def _aux_loss(batch: _Batch, sums: np.ndarray, finite: int) -> float | None:
    """Load balancing loss of one call: E x sum of (slots / T) x (mean probability)."""
    if batch.classes != batch.num_experts or finite == 0:
        return None
    return batch.num_experts * float(sums[FLOAT_FIELDS.index("load_x_prob")]) / (batch.tokens * finite)


def _computed_slots(info: RouterInfo, tokens: int, assignments: np.ndarray, zero_weight: int) -> int:
    """Rows that an expert multiplied: those of weight 0 too, those of identity experts not."""
    if info.every_expert_computes:
        return tokens * info.num_experts
    return int(assignments[: len(assignments) - info.identity_experts].sum()) + zero_weight


_MEANS = ("router_entropy", "confidence", "top1_prob", "topk_mass", "z_loss")


def _means(sums: np.ndarray, finite: int, classes: int) -> dict[str, float | None]:
    if finite == 0:
        return dict.fromkeys(_MEANS)
    mean = {name: float(value) / finite for name, value in zip(FLOAT_FIELDS, sums, strict=True)}
    entropy = max(0.0, mean["entropy"])
    # With one expert there is nothing to be unsure of.
    confidence = 1.0 - entropy / math.log(classes) if classes > 1 else 1.0
    return {
        "router_entropy": entropy,
        "confidence": confidence,
        "top1_prob": mean["top1_prob"],
        "topk_mass": mean["topk_mass"],
        "z_loss": mean["z_loss"],
    }
