"""The current forward of each thread, and its context: step, stage, padding."""

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
    """Mask of padding tokens; the phases of all tokens if `batch` provides them."""
    epoch: int = 0
    """Number of forwards of the model that the host has seen; orders samples that have no time."""
    recorded: bool = True
    """False for a step that `every` or `warmup` skips; hooks may still be installed for another thread."""
    of_model: bool = True
    """False for a router called outside any forward of the model, through a submodule."""
    profiled: bool = False
    """Whether a profiler records, even if on another thread only."""
    told: bool = False
    """Whether stage and padding are known from the arguments of a module."""
    start_ns: int = 0
    """Start time, if the host saw it."""
    ident: int = field(default_factory=threading.get_ident)
    """Identifier of the thread that runs it."""
    thread: int = field(default_factory=threading.get_native_id)
    """Native id of that thread."""
    recomputed: bool = False
    """Whether the backward pass runs it again, because it was checkpointed as a whole."""
    failed: bool = False
    """Whether an exception ended it."""
    padding_unclear: bool = False
    """Whether a block received another number of tokens than the mask has."""
    reached: list[Collection[int]] = field(default_factory=list)
    """Groups of sites whose router was called; shared with all copies made by `replace`."""
    held_bytes: float = float("inf")
    """Approximate size of the tensors that its routers return, if known."""
    tokens: Any = None
    """`ForwardTokens` if its routes are recorded."""
    batch: BatchTokens | None = None
    """Tokens described by a host framework."""

    def tell(self, batch: BatchTokens) -> None:
        """Set the tokens that a host framework describes."""
        self.batch, self.stage, self.padding_T, self.told = batch, batch.stage, batch.as_tensor(), True

    def again(self) -> ForwardContext:
        """Return the context for rerunning this forward in the backward pass, possibly on another thread."""
        context = self.here()
        context.recomputed, context.failed = True, False
        return context

    def here(self) -> ForwardContext:
        """Return a copy of the context for the calling thread."""
        return replace(self, thread=threading.get_native_id(), ident=threading.get_ident())


@dataclass(slots=True)
class Entered:
    """A module through which a thread entered the model."""

    level: int
    context: ForwardContext
    inside: int = 0
    """Number of modules entered inside it so far."""


class ForwardStack:
    """Stack per thread of the modules through which it entered the model, outermost first."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[Entered]] = {}
        """Stacks by thread, for threads inside a forward only."""
        self.last: ForwardContext | None = None
        """The forward that began last, to which a recomputation in the backward pass belongs."""

    def push(self, thread: int, level: int, context: ForwardContext) -> None:
        stack = self.stacks.get(thread)
        if stack is None:
            self.stacks[thread] = [Entered(level, context)]
            self.last = context
        else:
            stack.append(Entered(level, context))

    def contexts(self, *, without: int | None, innermost: bool) -> set[ForwardContext]:
        """Return the running forwards except those of thread `without`, or except its innermost one."""
        return {
            entered.context
            for thread, stack in list(self.stacks.items())
            for entered in (stack if thread != without else stack[:-1] if innermost else ())
        }

    def of(self, thread: int) -> ForwardContext | None:
        """Return the thread's forward; for a thread outside any, the running one if there is just one."""
        stack = self.stacks.get(thread)
        if stack:
            return stack[-1].context
        others = list(self.stacks.values())
        return others[0][-1].context if len(others) == 1 and others[0] else None
