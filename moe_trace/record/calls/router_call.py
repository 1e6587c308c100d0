"""Router calls joined from hook events, with experts matched by the memory of their tensors."""

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
    """One call of an experts module, with the arguments it received."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sending: Any = None
    mark: Any = None
    recomputed: bool = False
    """Whether it ran in a backward; then it belongs to the forward's call if its router did not."""


@dataclass(slots=True, eq=False)
class RouterCall(Call):
    """One call of a router with everything joined to it."""

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
    """(expert number, rows) for each call of an expert that is a module of its own."""
    fused: bool = False
    """Whether its block ended without calling any experts."""
    refused: bool = False
    """Whether a hook before its experts raised, so that they received nothing."""
    cut_off: bool = False
    """Whether an exception ended its forward before all experts that are modules of their own were called."""
    unjoined: bool = False
    """Whether experts of its site ran on another thread, for this or another call."""
    reading: Any = None
    """Result of `Found.read_block`, for a block that called neither its router nor its experts."""


@dataclass(slots=True, eq=False)
class Block:
    """One execution of a block."""

    context: ForwardContext | None
    calls: list[RouterCall] = field(default_factory=list)
    elsewhere: list[tuple[int, ExpertsCall]] = field(default_factory=list)
    """Calls of its site's experts on other threads meanwhile that memory matches to no router call."""


@dataclass(slots=True)
class SiteState:
    """Counts of one router's calls, and what they show about its block."""

    seen: int = 0
    recorded: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Lost calls by reason (`LOST_CALLS` in `data/summary_notes.py`)."""
    misread: str | None = None
    """Reason why the first unreadable call could not be read."""
    fused: int = 0
    """Number of calls whose block called neither its router nor its experts."""
    elsewhere: bool = False
    """Whether its experts were ever called on another thread than its router."""
    loose: bool = False
    """Whether its block ever ended without its experts, which may then run at any later time."""
    thread: int | None = None
    """Thread of the router's last call."""
    experts_called: bool = False
    """Whether its experts were ever called as a module."""
    own_word: range = range(0)
    """Numbers of calls recorded as fused, except those that turned out not to be."""

    def note(self, call: RouterCall) -> range:
        """Count a recorded call; return the numbers of calls that it refutes.

        If the experts are a module that is called, calls recorded without them may have assigned nothing.
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
        """Return the number of the first fused call, to which experts without a router most likely belong."""
        first, self.own_word = self.own_word[:1], self.own_word[1:]
        return first


def why_no_decision(
    call: RouterCall, site: RouterSite, state: SiteState, context: ForwardContext, *, observed: bool
) -> str | None:
    """Return why a router call assigned nothing, or nothing observable; None if it did.

    Args:
        observed: whether the calls inside its block were observed.
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
    """Return whether a module is in a block; mostly it is a child."""
    return any(child is part for child in block.children()) or part in set(block.modules())


def by_memory(experts: ExpertsCall, calls: Iterable[RouterCall]) -> list[RouterCall]:
    """Return the router calls whose output shares memory with what the experts received."""
    memory = set(_memory((*experts.args, *experts.kwargs.values())))
    return [call for call in calls if not memory.isdisjoint(_memory((call.router_output,)))]


def _memory(values: Iterable[Any]) -> Iterator[int]:
    """Yield the storage address of each tensor, which is unique while the tensor lives."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _memory(value)
        elif isinstance(value, Tensor):
            original = original_of(value)
            try:
                yield original.untyped_storage().data_ptr() or id(original)
            except Exception:  # a subclass or torch.func wrapper without its own storage
                yield id(original)
