"""One router call, joined from what the hooks saw; its experts are found by the memory of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_trace.find.contracts import Call
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.inplace_outputs import original_of
from moe_trace.record.forward.context import ForwardContext


@dataclass(slots=True)
class ExpertsCall:
    """One call of an experts module, as it received it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sending: Any = None
    mark: Any = None
    recomputed: bool = False
    """Where its router is not called again with it, it belongs to a decision of the forward."""


@dataclass(slots=True, eq=False)
class RouterCall(Call):
    """One call of a router with all that was joined to it."""

    site: int = 0
    thread: int = 0
    context: ForwardContext | None = None
    start_ns: int = 0
    end_ns: int = 0
    mark: Any = None
    recomputed: bool = False
    returned: bool = False
    experts: list[ExpertsCall] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)
    """(number of the expert, rows) of each call of one that is a module of its own."""
    fused: bool = False
    """Its block ended without having called any experts."""
    refused: bool = False
    """Its experts were called, and a hook before them raised: nothing was received."""
    cut_off: bool = False
    """An exception ended its forward before the experts that are modules of their own had all been called."""
    unjoined: bool = False
    """Experts of its site ran on another thread, for it or for another call."""
    reading: Any = None
    """Of a block that called neither its router nor its experts: what `Found.read_block` read."""


@dataclass(slots=True, eq=False)
class Block:
    """One execution of a block."""

    context: ForwardContext | None
    calls: list[RouterCall] = field(default_factory=list)
    elsewhere: list[tuple[int, ExpertsCall]] = field(default_factory=list)
    """Calls of its site's experts on other threads meanwhile, whose memory does not tell whose they are."""


@dataclass(slots=True)
class SiteState:
    """What became of the calls of one router, and what they taught."""

    seen: int = 0
    recorded: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """By reason (`LOST_CALLS` in `data/summary_notes.py`)."""
    misread: str | None = None
    """Why the first call that could not be read could not."""
    fused: int = 0
    """Calls of a block that called neither its router nor its experts."""
    elsewhere: bool = False
    """Whether its experts were ever called on another thread than its router."""
    loose: bool = False
    """Whether its block ever ended without its experts, which may then run at any later time."""
    thread: int | None = None
    """Where its router was called last."""
    experts_called: bool = False
    """Whether its experts were ever called as a module."""
    own_word: range = range(0)
    """Numbers of the calls that are recorded as fused ones, less those that turned out not to be."""

    def note(self, call: RouterCall) -> range:
        """A call is recorded; returns the numbers of those that are refuted by it.

        Where the experts are a module that is called, what was done without them may have assigned nothing.
        """
        before, number = self.own_word, self.recorded
        self.recorded += 1
        if call.experts:
            self.own_word = range(0)
            return before
        if call.reading is None:
            start = before.start if before and before.stop == number else number
            self.own_word = range(start, number + 1)
        return range(0)

    def refute(self) -> range:
        """Experts were called that have no router: the first such call was theirs, as far as can be told."""
        first, self.own_word = self.own_word[:1], self.own_word[1:]
        return first


def why_no_decision(
    call: RouterCall, site: RouterSite, state: SiteState, context: ForwardContext, *, observed: bool
) -> str | None:
    """Why a router call assigned nothing, or nothing that was seen; None where it did.

    Args:
        observed: whether it was seen which calls its block made.
    """
    if not call.returned or (call.refused and not call.experts):
        return "interrupted"
    if call.unjoined:
        return "unjoined"
    if call.experts or call.reading is not None or site.experts is None:
        return "interrupted" if call.cut_off else None
    if call.recomputed or context.failed:
        return "interrupted"
    if site.block is not None and not _holds(site.block, site.experts):
        return "replaced"
    if state.elsewhere or (call.fused and state.experts_called):
        return "unjoined"
    # A fused block calls its router but never its experts.
    fused = call.fused or (site.block is None and not state.experts_called)
    if fused:
        return None
    return "without_experts" if observed or site.block is None else "unjoined"


def _holds(block: nn.Module, part: nn.Module) -> bool:
    """Whether a module is in a block; mostly it is a child."""
    return any(child is part for child in block.children()) or part in set(block.modules())


def by_memory(experts: ExpertsCall, calls: Iterable[RouterCall]) -> list[RouterCall]:
    """Those of the router calls whose output shares memory with what the experts received."""
    given = set(_memory((*experts.args, *experts.kwargs.values())))
    return [call for call in calls if not given.isdisjoint(_memory((call.router_output,)))]


def _memory(values: Iterable[Any]) -> Iterator[int]:
    """What tells the memory of tensors: the address of their storage, which is theirs while they live."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _memory(value)
        elif isinstance(value, Tensor):
            original = original_of(value)
            try:
                yield original.untyped_storage().data_ptr() or id(original)
            except Exception:  # a subclass or a wrapper of torch.func, without a storage of its own
                yield id(original)
