"""Data types of contracts, which find a kind of router and read its calls.

Shape suffixes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_trace.data.errors import MoETraceError


class AdapterMismatch(MoETraceError):
    """Raised if a call of a router does not have the form that its contract expects."""


@dataclass(slots=True, eq=False)
class Call:
    """Arguments and outputs seen by hooks in one call of a router; `None` for modules not called."""

    router_args: tuple[Any, ...] | None = None
    router_output: Any = None
    experts_args: tuple[Any, ...] | None = None
    experts_kwargs: dict[str, Any] = field(default_factory=dict)
    watched_output: Any = None
    """Output of `Found.watched`."""
    expert_rows: tuple[int, ...] | None = None
    """[E] numbers of rows that entered each of `Found.listed`; None if they were not called as modules."""


@dataclass(frozen=True)
class ExpertRows:
    """Numbers of rows that entered experts, compared with a call's assignments once these are on the host."""

    rows_E: tuple[int, ...]
    """Number of rows that entered each expert."""
    by_logits: bool
    """Whether the assignments were computed from the router's logits rather than read from ids or masks."""
    whole: bool
    """Whether there are K rows per token, with a K known from the modules."""


@dataclass(slots=True)
class RouterOutput:
    """Output of a router in one call. Its tensors must be computed without synchronizing with the device."""

    index_TK: Tensor
    """Integer expert ids; a value outside [0, E) is a skipped slot, for which no expert runs."""
    weights_TK: Tensor
    """Gating weights that scale each slot's output; exactly 0 is a skipped slot that is still computed."""
    logits_TE: Tensor | None
    """The router's true logits (their softmax is its distribution), or None if the family has none."""
    rows: ExpertRows | None = None
    """Rows that entered the experts, if each expert is a module of its own."""
    told_E: Tensor | None = None
    """Tokens per expert as returned by the router; only used for comparison."""
    slots_2P: Tensor | None = None
    """Under a load balancer with P physical slots: [2 P] integers, the number of assignments to each slot,
    followed by the expert that each held in this call (-1: none)."""


ColumnReader = Callable[[Sequence[Any], Sequence[tuple[Any, ...]]], tuple[list[Any], ...]]
"""`reader(router_outputs, experts_args)` of calls without keyword arguments -> lists of index, weights and,
if there are any, logits, not validated. Raises if a call does not have the usual form."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The modules of one router, as found by a contract. Paths are relative to the inspected module."""

    router: nn.Module
    router_path: str
    experts: nn.Module | None
    """Module whose call ends that of the router; its arguments are read, and its time is the experts'."""
    block: nn.Module | None
    """Module that contains router and experts; None if it is never called as a module."""
    num_experts: int
    """E: classes of the router, including identity experts; 0 if only a call shows it."""
    top_k: int
    """K; 0 if only a call shows it."""
    num_slots: int = 0
    """P: see `RouterInfo.num_slots`."""
    read: Callable[[Call], RouterOutput] | None = None
    """Function that reads the calls of this router, if it differs from that of its contract."""
    read_block: Callable[[tuple[Any, ...], Any], RouterOutput] | None = None
    """`read_block(arguments, output)` for a call of the block in which the router was not called."""
    gate: nn.Module | None = None
    """Module that holds the router's weights, if the router itself has none."""
    watched: nn.Module | None = None
    """Module inside the router whose output `read` needs."""
    listed: tuple[nn.Module, ...] = ()
    """The E modules that are one expert each; the rows that enter them are the actual assignments."""
    times_experts: bool = True
    """False if `experts` is hooked for its input only, since the experts do not compute in it."""
    weights: tuple[nn.Module, ...] | None = None
    """Modules that hold the weights of the routed experts; None means `experts`."""
    shared: tuple[nn.Module, ...] | None = None
    """Modules that process every token in addition to the routed experts; None to find them by name."""
    identity_experts: int = 0
    """Number of identity experts, the last of the E, whose assignments have no FLOPs."""
    every_expert_computes: bool = False
    """Whether all E experts compute every token, regardless of the assignments."""
    notes: tuple[str, ...] = ()
    """Remarks needed to interpret the metrics of this router."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """An interface between routers and experts."""

    name: str
    description: str
    find: Callable[[nn.Module], list[Found]]
    """Function that returns the routers found at one module of a model, usually the block they are in."""
    read: Callable[[Call], RouterOutput]
    """Function that reads one call. It runs when the model's forward ends, and must not synchronize."""
    reads_late: bool = False
    """Whether `read` needs neither the router's arguments nor the first argument of the experts, the hidden
    states, which are then not kept until the forward ends."""
    columns: Mapping[Callable[[Call], RouterOutput], ColumnReader] = field(default_factory=dict)
    """Readers of many calls of the usual form at once, by the function that reads one of them."""
    combine: Callable[[Call, Sequence[Call], int], Call] | None = None
    """`combine(call, experts_calls, top_k)` merges several calls of the experts for one router call."""
