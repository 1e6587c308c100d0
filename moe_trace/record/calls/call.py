"""One router call on its way to its figures: what the hooks noted, and the tensors that it decided with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_trace.data.schema import Phase, Stage
from moe_trace.find.contracts import Reading
from moe_trace.find.routers import RouterSite
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
    padding_T: Tensor | None
    memory_bytes: int | None = None
    order: tuple[int, int] = (0, 0)
    """Forwards that the host saw before it, and how many that it did not see since: they have no time."""
    in_graph: bool = False
    graph_forward: int | None = None
    sending: DispatchInfo | None = None
    """None where the process runs alone."""


@dataclass(slots=True)
class PendingCall:
    record: CallRecord
    reading: Reading
    stream: int
    """On which its tensors are made: elsewhere they might be read too early."""

    @property
    def held_bytes(self) -> int:
        """Memory that it keeps alive."""
        reading = self.reading
        logits_TE = reading.logits_TE
        held = reading.index_TK.nbytes + reading.weights_TK.nbytes
        return held if logits_TE is None else held + logits_TE.nbytes

    def detach(self) -> None:
        """Keep the values only: a tensor with a history would keep the forward's activations alive."""
        detach(self.reading)


def detach(reading: Reading) -> None:
    """Keep a reading's values only."""
    if reading.weights_TK.requires_grad:
        reading.weights_TK = reading.weights_TK.detach()
    if reading.logits_TE is not None and reading.logits_TE.requires_grad:
        reading.logits_TE = reading.logits_TE.detach()
