"""The one vocabulary: record types, names in the trace, units and the schema version.

Everything that crosses from the recording half (torch) to the reading half (no torch) is defined here.
This module imports numpy and the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_trace.data.calls.sample import RANGE_KINDS as RANGE_KINDS
from moe_trace.data.calls.sample import STAGES as STAGES
from moe_trace.data.calls.sample import Phase as Phase
from moe_trace.data.calls.sample import Placement as Placement
from moe_trace.data.calls.sample import RangeKind as RangeKind
from moe_trace.data.calls.sample import RoutingSample as RoutingSample
from moe_trace.data.calls.sample import Span as Span
from moe_trace.data.calls.sample import Stage as Stage
from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import CompiledGraph

SCHEMA_VERSION = 1
METADATA_KEY = "moe_trace"  # of an event's arguments; of the trace's JSON in older files

RANGE_PREFIX = "moe."
RANGE_NAME = re.compile(r"moe\.(router|experts|block|graph)/(.+)", re.DOTALL)
GRAPH_LAUNCH = "cudaGraphLaunch"  # the runtime's call that replays a CUDA graph
OVERHEAD_RANGE = "moe_trace.reduce"  # the tracer's own device work, so that its cost is visible

# Linux hands out process ids below 2**22, so no traced process can have this one; the rank is added to it.
BAND_PID = 9_000_000
RANKS_MAX = 2**20
"""Of no run; a file that says more was changed, and would be counted through for ever."""
BAND_NAME = "MoE routing"
BAND_SORT_INDEX = -1_000_000  # above the CPU and GPU rows


def is_band(pid: object) -> bool:
    """Whether a process is the synthetic one of a rank's routing."""
    # Not every tool keeps whole numbers whole.
    return type(pid) in (int, float) and BAND_PID <= pid < BAND_PID + RANKS_MAX  # type: ignore[operator]


def range_name(kind: RangeKind, site: str) -> str:
    """`moe.router/L03`: stable per layer, so that `key_averages()` groups by it."""
    return f"{RANGE_PREFIX}{kind}/{site}"


@dataclass(frozen=True, kw_only=True)
class RouterInfo:
    """What is known of a router without running it; plain data, written to the trace."""

    site: str
    """Label in the trace, e.g. `L03` or `L03.text`."""
    name: str
    """Path of the router module in the model."""
    layer: int
    router_class: str
    experts_class: str | None
    contract: str
    """How a call of this router is read (see `moe_trace.find.contracts`)."""
    num_experts: int
    """E: classes of the router's decision (identity experts included)."""
    top_k: int
    """K: slots per token; 0 where it is only known once the router has run."""
    router_flops_per_token: int
    """2 x the router's matrix weights."""
    expert_flops_per_slot: int
    """2 x the matrix weights of one routed expert (all three matrices where it is gated)."""
    shared_flops_per_token: int = 0
    """2 x the matrix weights of the always-on experts beside the routed ones."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Parameter counts: `router`, `experts` (all routed), `shared`."""
    identity_experts: int = 0
    """How many of the E, the last ones, return their input: an assignment without FLOPs."""
    every_expert_computes: bool = False
    """Whether all E experts compute every token, whatever was chosen."""
    notes: tuple[str, ...] = ()
    """What a reader must know about the figures of this router."""
    held_experts: tuple[int, ...] | None = None
    """Global ids of the experts whose weights this process computes with; None where it is all of them. With
    `num_slots` they are ids of slots."""
    num_slots: int = 0
    """P: physical slots on all ranks together, on which a load balancer (EPLB) puts experts and replicas of
    some, and moves them while the run goes on; 0 where each expert has its place."""
    expert_bytes: int | None = None
    """Bytes of one routed expert's weights in this process, scales included; of a tensor-parallel rank its
    part. None where they are not known, as in files of older releases."""


@dataclass(frozen=True, kw_only=True)
class GraphMark:
    """The device's count of forwards, copied to the host at the end of a step: which replays are whose."""

    start_ns: int
    """`time.time_ns()` before the copy was launched; the copy itself stands in the trace, on its stream."""
    end_ns: int
    thread: int
    """Native id of the thread that launched it."""
    forwards: int
    """Forwards until then, whoever started them."""
    seen: int
    """Those of them that the host saw begin."""


@dataclass(frozen=True, kw_only=True)
class GraphCall:
    """Where the calls of one router or of its experts stand among the nodes of a captured graph."""

    name: str
    """Path of the router module."""
    kind: RangeKind
    first: int
    last: int
    """One past the last node."""


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A CUDA graph that was captured by hand, as far as the last MoE call in it.

    Nodes are those that do work: kernels, copies, memsets. Only a plain chain tells which event of a replay
    is which node.
    """

    nodes: int
    digest: str
    """Of its kernels' grids and blocks (`graph_digest`)."""
    calls: tuple[GraphCall, ...]
    copies: tuple[int, ...] = ()
    """Which of the nodes are copies or memsets."""
    problem: str | None = None
    """Why the events of a replay cannot be identified by their order; None where they can."""


def graph_digest(kernels: Iterable[str]) -> str:
    """Identity of a sequence of kernels, each `X,Y,Z X,Y,Z`: its grid and block."""
    import hashlib  # loads OpenSSL, which readers need not wait for

    return hashlib.sha256("\n".join(kernels).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What did not make it, so that each stage accounts for all that it took in."""

    samples_without_range: int = 0
    """Profiled samples without a place: the trace lacks their range, and holds others of the same thread."""
    without_range: dict[str, int] = field(default_factory=dict)
    """Samples whose range the trace does not hold: why -> how many. Beside those without a place, these are
    the ones that stand where the host's clock has them (`placed_by_clock`)."""
    ranges_without_sample: int = 0
    """Router ranges in the trace for which no decision was kept."""
    overwritten: int = 0
    """Oldest samples dropped because `capacity` was reached."""
    unreduced: int = 0
    """Calls whose figures could not be computed, for want of memory for example."""
    padding_unknown: int = 0
    """Forwards whose attention mask does not tell which of the tokens that the routers saw are padding (4-D,
    a static cache, blocks that are given a part of the tokens)."""
    misread: dict[str, str] = field(default_factory=dict)
    """Routers with calls that could not be read: module path -> why the first one could not."""
    never_called: tuple[str, ...] = ()
    """Routers that were found but not called while the tracer was on."""
    silent_forwards: int = 0
    """Forwards that were to be recorded and in which no router call was seen, where code was compiled: at
    least so many ran without the hooks, or without any MoE layer."""
    calls_seen: dict[str, int] = field(default_factory=dict)
    """Router calls that the hooks saw, by module path: each is recorded, or among `calls`."""
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    """Router calls that the hooks saw and the recording lacks: module path -> reason -> how many.
    `overwritten` and `unreduced` are part of them; the other reasons are explained by `notes_of`."""
    not_reached: dict[str, int] = field(default_factory=dict)
    """Forwards that reached no hook of a router that earlier ones did, by module path."""
    experts_without_router: int = 0
    """Calls of experts modules that belong to no router call."""
    hook_failure: str | None = None
    """What went wrong in a hook of ours, the first time; the calls of that forward may be missing."""
    unplaced: dict[str, int] = field(default_factory=dict)
    """Profiled calls inside graphs whose place in the trace is unknown: why -> how many."""
    untimed: dict[str, int] = field(default_factory=dict)
    """Calls inside graphs that have a place, but whose router has no latency: why -> how many."""


ExpertExchange = Literal["all_to_all", "all_reduce"]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How one process of a distributed run takes part in it; ranks are global."""

    mesh: dict[str, int]
    """Sizes of what the run is split by, those of 1 left out: `dp` (engines that serve), `dp_replicate`,
    `fsdp`, `tp`, `ep`, `etp` (tensor parallelism of the experts, where it is not that of the rest), `pp`."""
    token_ranks: tuple[int, ...]
    """Ranks whose routers see the same tokens as this one's, itself among them, ascending: their counts are
    one decision, to be counted once."""
    expert_ranks: tuple[int, ...] = ()
    """The expert-parallel group in the order of its shards; empty where every rank has all experts."""
    expert_exchange: ExpertExchange | None = None
    """How tokens reach their experts; None without expert parallelism."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """All that was recorded about one model, or that one trace file holds."""

    model: dict[str, Any]
    """`name`, `class`, `num_layers`, `num_parameters`, `dtype`, `device`."""
    options: dict[str, Any]
    """`layers`, `every`, `warmup`, `capacity` as the tracer had them."""
    routers: tuple[RouterInfo, ...]
    samples: Sequence[RoutingSample]
    """Any sequence of them is kept as a `CallTable`."""
    lost: Lost
    rank: int = 0
    world_size: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    parallel: Parallel | None = None
    """None where the process runs alone, or does not know."""
    graph_marks: tuple[GraphMark, ...] = ()
    """Counts of forwards that only the device saw, in order of time."""
    captured_graphs: tuple[CapturedGraph, ...] = ()
    graphs_compiled: bool = False
    """Whether torch.compile made graphs that record, beside those that were captured by hand."""
    annotated_nodes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Range name -> ids of the nodes that it made in graphs captured with annotations; the trace has them as
    `graph node id`."""
    routes: str | None = None
    """File of the routes of each token, relative to the trace; None where they were not recorded."""

    compiled_graphs: tuple[CompiledGraph, ...] = ()
    """What torch.compile made while the tracer was active, by the compiler's provenance."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", CallTable.of(self.samples))

    @property
    def calls(self) -> CallTable:
        """The samples by column."""
        assert isinstance(self.samples, CallTable)
        return self.samples

    @property
    def experts_are_split(self) -> bool:
        """Whether this process computes other slots than its routers assigned, or a part of each: the time of
        its experts is then not that of its calls' FLOPs."""
        parallel = self.parallel
        if parallel is None:
            return False
        return bool(parallel.expert_ranks) or max(parallel.mesh.get(dim, 1) for dim in ("tp", "etp")) > 1
