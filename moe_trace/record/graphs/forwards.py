"""Attribution of forwards whose router outputs graphs write to steps and times.

A forward that the host saw begin (its hook ran eagerly) has a known step and time. One that it did not see,
because its hook was compiled or is replayed, is only counted, on the device; marks give its step.
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
_BATCHES_MAX = 1024  # forwards between two marks whose batches are kept
_MARKS_IN_TRACES = 10_000  # more than the steps that fit into a trace


@dataclass(slots=True)
class Segment:
    """The forwards between two marks that the host did not see."""

    step: int | None
    """Step of all these forwards; None if each forward is a step."""
    profiled: bool
    sampled: bool
    batches: tuple[BatchTokens, ...] = ()
    """Batches that a host framework described since the last mark; used if there is one for each forward."""


@dataclass(slots=True)
class _Mark:
    segment: Segment
    state: Tensor
    copied: torch.cuda.Event | None
    data: GraphMark
    """The mark as the timeline needs it; its `forwards` is 0 until `marks` fills it in."""

    def passed(self) -> bool:
        return self.copied is None or self.copied.query()

    def forwards(self) -> int:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return int(self.state)


class GraphForwards:
    """The host's record of a model's forwards: those that it saw begin, and marks between the others.

    Args:
        seen: returns the number of forwards that the host has seen.
        samples_step: returns whether a step is recorded.
    """

    def __init__(self, seen: Callable[[], int], samples_step: Callable[[int], bool]) -> None:
        self.seen = seen
        self.epoch = 0
        """Number of forwards that the host saw begin."""
        self.forgotten = 0
        """Number of calls whose forward was no longer remembered."""
        self.batch: BatchTokens | None = None
        """Description of the tokens of the latest forward, or of the one about to begin."""
        self.counted_after = 0
        """Number of the last forward before those that the device counts."""
        self._batches: deque[BatchTokens] = deque(maxlen=_BATCHES_MAX)
        """Batches of the forwards since the last mark that the host did not see."""
        self._samples_step = samples_step
        self._latest: ForwardContext | None = None
        self._by_epoch: dict[int, ForwardContext] = {}
        self._marks: deque[_Mark] = deque(maxlen=REMEMBERED)
        self._profiled_marks: deque[_Mark] = deque(maxlen=_MARKS_IN_TRACES)
        """Marks that appear in a trace."""

    # -- called during a forward ----------------------------------------------------------------------

    def begin(self, forward: ForwardContext) -> int:
        """Record that the host sees a forward begin, and return its epoch."""
        self.epoch += 1
        self._latest, self.batch = forward, forward.batch
        if self._batches and self._batches[-1] is forward.batch:
            self._batches.pop()
        return self.epoch

    def describe(self, batch: BatchTokens) -> None:
        """Record the tokens of the next forward, as described by a host framework."""
        self.batch = batch
        self._batches.append(batch)

    def remember(self) -> bool:
        """Keep the context of the latest forward, in which graphs write; return False if there is none."""
        if self._latest is None:
            return False
        self._by_epoch[self.epoch] = self._latest
        self._by_epoch.pop(self.epoch - REMEMBERED, None)
        return True

    def mark(self, segment: Segment, count: Tensor, *, in_trace: bool) -> int:
        """Assign all forwards since the last mark to `segment`, without synchronizing.

        Args:
            count: number of forwards, counted on the device.
            in_trace: whether a profiler records, so that the copy of the count appears in its trace.

        Returns:
            The count at the last mark whose copy is complete; 0 if there is none.
        """
        segment.batches = tuple(self._batches)
        self._batches.clear()
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

    # -- called when the rings are drained ------------------------------------------------------------

    def seen_by_host(self, epoch: int) -> int:
        """Return the number of remembered forwards that the host saw begin, up to this epoch."""
        return sum(begun <= epoch for begun in list(self._by_epoch))

    def marks(self) -> tuple[GraphMark, ...]:
        """Return the marks that were set while a profiler recorded. Waits for their copies."""
        return tuple(replace(mark.data, forwards=mark.forwards()) for mark in self._profiled_marks)

    def segments(self) -> list[tuple[int, Segment]]:
        """Return (number of the last forward, segment) pairs in order. Waits for the copies of the marks."""
        return [(mark.forwards(), mark.segment) for mark in self._marks]

    def full_epoch(self, epoch: int) -> int:
        """Return the full epoch of a row, which stores it modulo `EXACT`."""
        return self.epoch - (self.epoch - epoch) % EXACT

    def attribute_to_host(self, record: CallRecord, epoch: int) -> bool:
        """Set a call's step and time to those of a forward the host saw; return whether it is recorded."""
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
        """Set the step of a call in a forward that was only counted; return whether the step is recorded."""
        record.graph_forward = forward
        index = next((i for i, (end, _) in enumerate(segments) if forward <= end), None)
        if index is None:
            return False
        end, segment = segments[index]
        before = segments[index - 1][0] if index else self.counted_after
        if segment.batches and len(segment.batches) == end - before:
            record.batch = segment.batches[forward - before - 1]
            record.stage = record.batch.stage
        record.step = forward - 1 if segment.step is None else segment.step
        record.profiled = segment.profiled
        return segment.sampled and (segment.step is not None or self._samples_step(record.step))

    def forget(self, oldest: int, epoch: int) -> None:
        """Forget forwards up to `oldest` and epochs before `epoch`, whose rows have been drained.

        `epoch` is that of the last shipment. Another thread may have begun newer forwards since, whose rows
        are still to come, so the containers are changed in place.
        """
        for begun in list(self._by_epoch):
            if begun < epoch:
                self._by_epoch.pop(begun, None)
        # The mark before a segment is kept, since it gives the segment's start.
        while len(self._marks) > 1 and self._marks[1].forwards() < oldest:
            self._marks.popleft()
