"""What a contract is: how a kind of router is recognised by its modules, and how one of its calls is read.

Shape suffixes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_trace.data.errors import MoETraceError


class AdapterMismatch(MoETraceError):
    """A call of a router has another form than its contract expects."""


@dataclass(slots=True, eq=False)
class Call:
    """What the hooks saw in one call of a router; `None` for a module that was not called."""

    router_args: tuple[Any, ...] | None = None
    router_output: Any = None
    experts_args: tuple[Any, ...] | None = None
    experts_kwargs: dict[str, Any] = field(default_factory=dict)
    watched_output: Any = None
    """What `Found.watched` returned."""
    expert_rows: tuple[int, ...] | None = None
    """[E] rows that entered each of `Found.listed`; None where they were not called as modules."""


@dataclass(frozen=True)
class ExpertRows:
    """What the decision of a call is held against, when its counts have come to the host."""

    rows_E: tuple[int, ...]
    """That entered each expert."""
    by_logits: bool
    """Whether the decision was computed from the router's logits; else somebody named the experts."""
    whole: bool
    """Whether they are K rows a token, with a K that the modules tell."""


@dataclass(slots=True)
class RouterOutput:
    """The decision in one call. None of its tensors may have been computed by waiting for the device."""

    index_TK: Tensor
    """Integer expert ids; a value outside [0, E) is a skipped slot, for which no expert runs."""
    weights_TK: Tensor
    """What scales each slot's output; exactly 0 means a skipped slot, which is computed all the same."""
    logits_TE: Tensor | None
    """The router's true logits (their softmax is its distribution), or None where the family has none."""
    rows: ExpertRows | None = None
    """Where each expert is a module of its own."""
    told_E: Tensor | None = None
    """Tokens per expert in the router's own words: never the source, only compared."""
    slots_2P: Tensor | None = None
    """Where a load balancer puts experts on P physical slots: [2 P] integers, the assignments that went to
    each slot, then the expert that it held in this call (-1: none)."""


ColumnReader = Callable[[Sequence[Any], Sequence[tuple[Any, ...]]], tuple[list[Any], ...]]
"""`reader(router_outputs, experts_args)` of calls without keyword arguments -> index, weights and, where
there are any, logits of each call, unlooked at. Raises where a call is none of the usual ones."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The modules of one router, as a contract sees them. Paths are relative to the module looked at."""

    router: nn.Module
    router_path: str
    experts: nn.Module | None
    """The module whose call ends the decision; its input is the reading's, its time the experts'."""
    block: nn.Module | None
    """What holds router and experts; None where it is never called as a module."""
    num_experts: int
    """E: classes of the decision, identity experts included; 0 where only a call can tell."""
    top_k: int
    """K; 0 where only a call can tell."""
    num_slots: int = 0
    """P: see `RouterInfo.num_slots`."""
    read: Callable[[Call], RouterOutput] | None = None
    """How the calls of this very router are read, where its contract knows more than one way."""
    read_block: Callable[[tuple[Any, ...], Any], RouterOutput] | None = None
    """`read_block(arguments, output)` of a call of the block in which the router was not called."""
    gate: nn.Module | None = None
    """The module beside the router that holds its weights, where the router itself holds none."""
    watched: nn.Module | None = None
    """A module inside the router whose output `read` needs."""
    listed: tuple[nn.Module, ...] = ()
    """The E modules that are one expert each: the rows that enter them are the truth of a decision."""
    times_experts: bool = True
    """False where `experts` is hooked for its input alone: it is not where the experts compute."""
    weights: tuple[nn.Module, ...] | None = None
    """Modules that hold the weights of the routed experts; None means `experts`."""
    shared: tuple[nn.Module, ...] | None = None
    """Modules that work on every token beside the routed experts; None means: found by name."""
    identity_experts: int = 0
    """How many of the E, the last ones, are identities: an assignment without FLOPs."""
    every_expert_computes: bool = False
    """Whether all E experts compute every token, whatever was chosen."""
    notes: tuple[str, ...] = ()
    """What a reader must know about the figures of this router."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One way in which routers and experts speak to each other."""

    name: str
    description: str
    find: Callable[[nn.Module], list[Found]]
    """The routers that stand at one module of a model, which is mostly the block that holds them."""
    read: Callable[[Call], RouterOutput]
    """One call of such a router. Runs when the model's forward ends: it must not wait for the device."""
    reads_late: bool = False
    """Whether `read` needs neither the router's arguments nor the first one of the experts, the hidden
    states: those are then not kept until the forward ends."""
    columns: Mapping[Callable[[Call], RouterOutput], ColumnReader] = field(default_factory=dict)
    """By the function that reads a call: what reads many usual calls at once."""
    combine: Callable[[Call, Sequence[Call], int], Call] | None = None
    """`combine(call, experts_calls, top_k)`: one call for several calls of the experts in one decision."""
