"""Router calls on their way to their figures: what the hooks noted of each."""

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
    order: tuple[int, int] = (0, 0)
    """Forwards that the host saw before it, and how many that it did not see since: they have no time."""
    in_graph: bool = False
    graph_forward: int | None = None
    sending: DispatchInfo | None = None
    """None where the process runs alone."""
    rows: ExpertRows | None = None
    told_E: Tensor | None = None
    """See `RouterOutput`, both."""
    slots_2P: Tensor | None = None
    """See `RouterOutput`."""
    tokens: Any = None
    """`ForwardTokens` where its routes are recorded."""
    batch: BatchTokens | None = None
    """What a host framework reports of its tokens."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[CallRecord]:
        yield self


@dataclass(slots=True)
class ForwardRecords:
    """The calls of a forward that called each of some routers once, in columns."""

    context: ForwardContext
    sites: Sequence[RouterSite]
    first: Sequence[int]
    """Number of a call, less `forwards`, by site."""
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
    """The records of many calls, in order; those of whole forwards stay in columns until asked for."""

    __slots__ = ("_count", "_parts")

    def __init__(self, parts: Sequence[CallRecord | ForwardRecords] = ()) -> None:
        self._parts = list(parts)
        self._count = sum(map(len, self._parts))

    @property
    def last_step(self) -> int:
        """The step of the last one; -1 without any."""
        part = self._parts[-1] if self._parts else None
        return -1 if part is None else part.step if isinstance(part, CallRecord) else part.context.step

    def append(self, part: CallRecord | ForwardRecords) -> None:
        """One call, or those of a forward."""
        self._parts.append(part)
        self._count += len(part)

    def drop(self, count: int) -> None:
        """Forget the first calls."""
        self._parts = list(islice(self, count, None))
        self._count = len(self._parts)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[CallRecord]:
        return chain.from_iterable(self._parts)


def detach(reading: RouterOutput) -> None:
    """Keep a reading's values only: a tensor with a history would keep the forward's activations alive."""
    if reading.weights_TK.requires_grad:
        reading.weights_TK = reading.weights_TK.detach()
    if reading.logits_TE is not None and reading.logits_TE.requires_grad:
        reading.logits_TE = reading.logits_TE.detach()
