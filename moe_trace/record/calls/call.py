"""Records of router calls whose metrics have not been computed yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from torch import Tensor

from moe_trace.data.schema import Phase, Stage
from moe_trace.find.contracts import ExpertRows, RouterOutput
from moe_trace.find.routers import RouterSite
from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.forward.context import ForwardContext
from moe_trace.record.parallel.dispatch import DispatchInfo


@dataclass(slots=True)
class CallRecord:
    """One router call, before its metrics are known."""

    site: RouterSite
    call: int
    step: int
    phase: Phase
    stage: Stage
    start_ns: int
    end_ns: int
    thread: int
    profiled: bool
    order: tuple[int, int] = (0, 0)
    """Forwards that the host saw before it, and then forwards that it did not see, which have no time."""
    in_graph: bool = False
    graph_forward: int | None = None
    sending: DispatchInfo | None = None
    """None if the process runs alone."""
    rows: ExpertRows | None = None
    told_E: Tensor | None = None
    """See `RouterOutput`, for both."""
    slots_2P: Tensor | None = None
    """See `RouterOutput`."""
    tokens: Any = None
    """`ForwardTokens` if its routes are recorded."""
    batch: BatchTokens | None = None
    """Tokens described by a host framework."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[CallRecord]:
        yield self


@dataclass(slots=True)
class ForwardRecords:
    """The calls, in columns, of a forward that called each of its routers once."""

    context: ForwardContext
    sites: Sequence[RouterSite]
    first: Sequence[int]
    """Number of each site's call, minus `forwards`."""
    forwards: int
    starts_ns: Sequence[int]
    ends_ns: Sequence[int]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[CallRecord]:
        context, columns = self.context, (self.sites, self.first, self.starts_ns, self.ends_ns)
        for site, first, start_ns, end_ns in zip(*columns, strict=True):
            yield CallRecord(
                site,
                first + self.forwards,
                context.step,
                "forward",
                context.stage,
                start_ns,
                end_ns,
                context.thread,
                context.profiled,
                order=(context.epoch, 0),
                tokens=context.tokens,
                batch=context.batch,
            )


class Records:
    """The records of many calls, in order; whole forwards stay in columns until iterated."""

    __slots__ = ("_count", "_parts")

    def __init__(self, parts: Sequence[CallRecord | ForwardRecords] = ()) -> None:
        self._parts = list(parts)
        self._count = sum(map(len, self._parts))

    @property
    def last_step(self) -> int:
        """Step of the last call; -1 if there are no calls."""
        part = self._parts[-1] if self._parts else None
        return -1 if part is None else part.step if isinstance(part, CallRecord) else part.context.step

    def append(self, part: CallRecord | ForwardRecords) -> None:
        """Add one call, or the calls of one forward."""
        self._parts.append(part)
        self._count += len(part)

    def drop(self, count: int) -> None:
        """Remove the first `count` calls."""
        self._parts = list(islice(self, count, None))
        self._count = len(self._parts)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[CallRecord]:
        return chain.from_iterable(self._parts)


def detach(reading: RouterOutput) -> None:
    """Detach a reading's tensors: with a gradient history they would keep the forward's activations alive."""
    if reading.weights_TK.requires_grad:
        reading.weights_TK = reading.weights_TK.detach()
    if reading.logits_TE is not None and reading.logits_TE.requires_grad:
        reading.logits_TE = reading.logits_TE.detach()
