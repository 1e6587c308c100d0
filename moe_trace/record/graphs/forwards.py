"""The forwards whose decisions graphs write: which step each belongs to, and when it ran.

A forward that the host saw begin (its hook ran eagerly) has that forward's step and time. One that it did
not see, because its hook was compiled or is replayed, is only counted, by the device; marks tell its step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_trace.data.schema import GraphMark
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.graphs.ring_buffer import EXACT
from moe_trace.record.reduce.streams import copies_on_host

REMEMBERED = 100_000  # forwards and marks whose step is remembered until they are drained
_TOLD_MAX = 1024  # forwards between two marks
_MARKS_IN_TRACES = 10_000  # more steps than a trace can hold


@dataclass(slots=True)
class Segment:
    """Forwards that the host did not see, up to a mark."""

    step: int | None
    """None where a step is one forward."""
    profiled: bool
    sampled: bool
    batches: tuple[BatchTokens, ...] = ()
    """What a host framework told of them, one of each, if it told all."""


@dataclass(slots=True)
class _Mark:
    segment: Segment
    state: Tensor
    copied: torch.cuda.Event | None
    data: GraphMark
    """What placing needs of it, once it has passed."""

    def passed(self) -> bool:
        return self.copied is None or self.copied.query()

    def forwards(self) -> int:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return int(self.state)


class GraphForwards:
    """What the host knows of a model's forwards: those that it saw begin, and the marks between the others.

    Args:
        seen: returns how many forwards the host has seen.
        samples_step: whether the decisions of a step are wanted.
    """

    def __init__(self, seen: Callable[[], int], samples_step: Callable[[int], bool]) -> None:
        self.seen = seen
        self.epoch = 0
        """Forwards that the host saw begin."""
        self.forgotten = 0
        """Calls whose forward was no longer remembered."""
        self.batch: BatchTokens | None = None
        """What was told of the forward that began, or begins, last."""
        self.counted_after = 0
        """The last forward before those that the device counts."""
        self._told: deque[BatchTokens] = deque(maxlen=_TOLD_MAX)
        """Of forwards since the last mark that the host did not see."""
        self._samples_step = samples_step
        self._latest: ForwardContext | None = None
        self._by_epoch: dict[int, ForwardContext] = {}
        self._marks: deque[_Mark] = deque(maxlen=REMEMBERED)
        self._profiled_marks: deque[_Mark] = deque(maxlen=_MARKS_IN_TRACES)
        """Those that stand in a trace."""

    # -- noted in the forward's time ------------------------------------------------------------------

    def begin(self, forward: ForwardContext) -> int:
        """The host sees a forward begin; returns its epoch."""
        self.epoch += 1
        self._latest, self.batch = forward, forward.batch
        if self._told and self._told[-1] is forward.batch:
            self._told.pop()
        return self.epoch

    def describe(self, batch: BatchTokens) -> None:
        """A host framework tells the tokens of the forward that begins next."""
        self.batch = batch
        self._told.append(batch)

    def remember(self) -> bool:
        """Graphs write in the forward that began last; returns whether the host saw any begin."""
        if self._latest is None:
            return False
        self._by_epoch[self.epoch] = self._latest
        self._by_epoch.pop(self.epoch - REMEMBERED, None)
        return True

    def mark(self, segment: Segment, count: Tensor, *, in_trace: bool) -> int:
        """All forwards since the last mark belong to `segment`; nothing waits.

        Args:
            count: the device's count of forwards.
            in_trace: a profiler records, so that the copy of the count will stand in its trace.

        Returns:
            The device's count at the last mark that it is known to have passed.
        """
        segment.batches = tuple(self._told)
        self._told.clear()
        start_ns = time.time_ns()
        copies, copied = copies_on_host([count])
        data = GraphMark(
            start_ns=start_ns,
            end_ns=time.time_ns(),
            thread=threading.get_native_id(),
            forwards=0,
            seen=self.seen(),
        )
        mark = _Mark(segment, copies[0], copied, data)
        self._marks.append(mark)
        if in_trace:
            self._profiled_marks.append(mark)
        passed = [mark for mark in self._marks if mark.passed()]
        return passed[-1].forwards() if passed else 0

    # -- asked when the decisions are drained ---------------------------------------------------------

    def seen_by_host(self, epoch: int) -> int:
        """How many are remembered of those that the host saw begin, up to this epoch."""
        return sum(begun <= epoch for begun in list(self._by_epoch))

    def marks(self) -> tuple[GraphMark, ...]:
        """The marks that were set while a profiler recorded. Waits for their copies."""
        return tuple(replace(mark.data, forwards=mark.forwards()) for mark in self._profiled_marks)

    def segments(self) -> list[tuple[int, Segment]]:
        """(number of the last forward, segment), in order. Waits for the copies of the marks."""
        return [(mark.forwards(), mark.segment) for mark in self._marks]

    def full_epoch(self, epoch: int) -> int:
        """The epoch of a row, which counts modulo `EXACT`."""
        return self.epoch - (self.epoch - epoch) % EXACT

    def attribute_to_host(self, record: CallRecord, epoch: int) -> bool:
        """Give a call the step and time of a forward that the host saw; returns whether it is wanted."""
        seen = self._by_epoch.get(epoch)
        if seen is None:
            self.forgotten += 1
            return False
        record.step, record.stage, record.tokens = seen.step, seen.stage, seen.tokens
        record.batch = seen.batch
        record.start_ns = record.end_ns = seen.start_ns
        record.thread, record.profiled = seen.thread, seen.profiled
        return seen.recorded

    def attribute_to_segment(
        self, record: CallRecord, forward: int, segments: list[tuple[int, Segment]]
    ) -> bool:
        """Give a call the step of a forward that was only counted; returns whether it is wanted."""
        record.graph_forward = forward
        place = next((i for i, (end, _) in enumerate(segments) if forward <= end), None)
        if place is None:
            return False
        end, segment = segments[place]
        before = segments[place - 1][0] if place else self.counted_after
        if segment.batches and len(segment.batches) == end - before:
            record.batch = segment.batches[forward - before - 1]
            record.stage = record.batch.stage
        record.step = forward - 1 if segment.step is None else segment.step
        record.profiled = segment.profiled
        return segment.sampled and (segment.step is not None or self._samples_step(record.step))

    def forget(self, oldest: int, epoch: int) -> None:
        """The rows of all forwards up to `oldest` were drained, and of all epochs before `epoch`.

        That is the epoch of the last shipment. On another thread newer forwards may have begun since, whose
        rows are still to come, so what is remembered changes in place.
        """
        for begun in list(self._by_epoch):
            if begun < epoch:
                self._by_epoch.pop(begun, None)
        while len(self._marks) > 1 and self._marks[1].forwards() < oldest:  # the one before tells a beginning
            self._marks.popleft()
