"""Which forward of the model a thread is in, and what is known of it: step, stage, padding."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moe_trace.data.schema import Stage
from moe_trace.record.forward.batch_tokens import BatchTokens


@dataclass(slots=True, eq=False)
class ForwardContext:
    """One forward of the model."""

    step: int
    stage: Stage
    padding_T: Tensor | None = None
    """Which tokens are padding; the phases of all where `batch` tells them."""
    epoch: int = 0
    """Forwards of the model that the host has seen; orders samples that have no time."""
    recorded: bool = True
    """False for a step left out by `every` or `warmup`, whose hooks may be on for another thread's sake."""
    of_model: bool = True
    """False for a router called outside any forward of the model: through a submodule."""
    profiled: bool = False
    """Whether a profiler records, be it another thread only."""
    told: bool = False
    """Whether the arguments of a module told stage and padding."""
    start_ns: int = 0
    """When it began, where the host saw that."""
    ident: int = field(default_factory=threading.get_ident)
    """The thread that runs it."""
    thread: int = field(default_factory=threading.get_native_id)
    """Its native id."""
    recomputed: bool = False
    """Checkpointed as a whole, and run again by the backward."""
    failed: bool = False
    """An exception ended it."""
    padding_unclear: bool = False
    """A block saw another number of tokens than the mask has."""
    reached: list[Collection[int]] = field(default_factory=list)
    """Sites whose router was called, some at a time; shared by all that `replace` makes of it."""
    held_bytes: float = float("inf")
    """Of the tensors that its routers hand out, about, where that is known."""
    tokens: Any = None
    """`ForwardTokens` where its routes are recorded."""
    batch: BatchTokens | None = None
    """What a host framework reports."""

    def tell(self, batch: BatchTokens) -> None:
        """A host framework tells its tokens."""
        self.batch, self.stage, self.padding_T, self.told = batch, batch.stage, batch.as_tensor(), True

    def again(self) -> ForwardContext:
        """The same forward, run again by its backward, maybe on another thread."""
        context = self.here()
        context.recomputed, context.failed = True, False
        return context

    def here(self) -> ForwardContext:
        """The same forward on the calling thread."""
        return replace(self, thread=threading.get_native_id(), ident=threading.get_ident())


@dataclass(slots=True)
class Entered:
    """A module of the model that a thread is in."""

    level: int
    context: ForwardContext
    inside: int = 0
    """Modules entered inside it so far."""


class ForwardStack:
    """The modules that each thread entered the model through, outermost first."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[Entered]] = {}
        """By thread; of none that is in no forward."""
        self.last: ForwardContext | None = None
        """The forward that began last: what a recomputation in the backward belongs to."""

    def push(self, thread: int, level: int, context: ForwardContext) -> None:
        """A thread enters a module."""
        stack = self.stacks.get(thread)
        if stack is None:
            self.stacks[thread] = [Entered(level, context)]
            self.last = context
        else:
            stack.append(Entered(level, context))

    def contexts(self, *, without: int | None, innermost: bool) -> set[ForwardContext]:
        """The forwards under way, but for all of a thread, or but for its innermost one."""
        return {
            entered.context
            for thread, stack in list(self.stacks.items())
            for entered in (stack if thread != without else stack[:-1] if innermost else ())
        }

    def of(self, thread: int) -> ForwardContext | None:
        """The forward that a thread is in; for one that only helps, the only one under way."""
        stack = self.stacks.get(thread)
        if stack:
            return stack[-1].context
        others = list(self.stacks.values())
        return others[0][-1].context if len(others) == 1 and others[0] else None
