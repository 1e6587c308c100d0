"""Record types, names in the trace, units and the schema version.

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
METADATA_KEY = "moe_trace"  # in an event's arguments; at the top level of older files

RANGE_PREFIX = "moe."
RANGE_NAME = re.compile(r"moe\.(router|experts|block|graph)/(.+)", re.DOTALL)
GRAPH_LAUNCH = "cudaGraphLaunch"  # the runtime's call that replays a CUDA graph
OVERHEAD_RANGE = "moe_trace.reduce"  # the tracer's own device work, so that its cost is visible

# Linux assigns process ids below 2**22, so no traced process can have this one; the rank is added to it.
BAND_PID = 9_000_000
RANKS_MAX = 2**20
"""More ranks than any run has. A file with more was changed, and looping over them would not end."""
BAND_NAME = "MoE routing"
BAND_SORT_INDEX = -1_000_000  # above the CPU and GPU rows


def is_band(pid: object) -> bool:
    """Return whether a process id is that of a rank's synthetic routing process."""
    # Some tools write integers as floats.
    return type(pid) in (int, float) and BAND_PID <= pid < BAND_PID + RANKS_MAX  # type: ignore[operator]


def range_name(kind: RangeKind, site: str) -> str:
    """Return a range name such as `moe.router/L03`; stable per layer, for grouping by `key_averages()`."""
    return f"{RANGE_PREFIX}{kind}/{site}"


@dataclass(frozen=True, kw_only=True)
class RouterInfo:
    """Static description of a router, known without running it; plain data, written to the trace."""

    site: str
    """Label in the trace, e.g. `L03` or `L03.text`."""
    name: str
    """Module path of the router."""
    layer: int
    router_class: str
    experts_class: str | None
    contract: str
    """Name of the contract that reads this router's calls (see `moe_trace.find.contracts`)."""
    num_experts: int
    """E: number of classes of the router's decision (identity experts included)."""
    top_k: int
    """K: slots per token; 0 if it is only known once the router has run."""
    router_flops_per_token: int
    """2 x the parameters of the router's weight matrices."""
    expert_flops_per_slot: int
    """2 x the parameters of one routed expert's weight matrices (all three of a gated expert)."""
    shared_flops_per_token: int = 0
    """2 x the parameters of the weight matrices of the always-active shared experts."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Parameter counts: `router`, `experts` (all routed), `shared`."""
    identity_experts: int = 0
    """Number of the last of the E experts that return their input: an assignment without FLOPs."""
    every_expert_computes: bool = False
    """Whether all E experts compute every token, whatever was chosen."""
    notes: tuple[str, ...] = ()
    """Notes on the numbers of this router."""
    held_experts: tuple[int, ...] | None = None
    """Global ids of the experts whose weights this process computes with; None if all. With `num_slots` they
    are slot ids."""
    num_slots: int = 0
    """P: physical slots on all ranks together, to which a load balancer (EPLB) assigns experts and their
    replicas, and which it rearranges during the run; 0 without one."""
    expert_bytes: int | None = None
    """Bytes of one routed expert's weights in this process, scales included; on a tensor-parallel rank only
    its shard. None if unknown, as in files of older releases."""


@dataclass(frozen=True, kw_only=True)
class GraphMark:
    """The device's count of forwards, copied to the host when a step ends; assigns replays to steps."""

    start_ns: int
    """`time.time_ns()` before the copy was launched; the copy itself appears in the trace, on its stream."""
    end_ns: int
    thread: int
    """Native id of the thread that launched it."""
    forwards: int
    """Number of forwards so far, whatever started them."""
    seen: int
    """Number of those whose beginning the host saw."""


@dataclass(frozen=True, kw_only=True)
class GraphCall:
    """Position of the calls of one router or of its experts among the nodes of a captured graph."""

    name: str
    """Module path of the router."""
    kind: RangeKind
    first: int
    last: int
    """One past the last node."""


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A manually captured CUDA graph, up to the last MoE call in it.

    Nodes are those that do work: kernels, copies, memsets. The events of a replay can be assigned to nodes
    only if the graph is a plain chain.
    """

    nodes: int
    digest: str
    """Digest of the grids and blocks of its kernels (`graph_digest`)."""
    calls: tuple[GraphCall, ...]
    copies: tuple[int, ...] = ()
    """Indices of the nodes that are copies or memsets."""
    problem: str | None = None
    """Why the events of a replay cannot be identified by their order; None if they can."""


def graph_digest(kernels: Iterable[str]) -> str:
    """Return a digest of a sequence of kernels, each given by grid and block as `X,Y,Z X,Y,Z`."""
    import hashlib  # imports OpenSSL, which readers do not need

    return hashlib.sha256("\n".join(kernels).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Counts of what was lost, so that each stage accounts for all its input."""

    samples_without_range: int = 0
    """Profiled samples without a place: the trace lacks their range but has others of the same thread."""
    without_range: dict[str, int] = field(default_factory=dict)
    """Number of samples whose range is missing from the trace, by reason. Includes the samples without a
    place and those placed by the host's clock (`placed_by_clock`)."""
    ranges_without_sample: int = 0
    """Router ranges in the trace for which no decision was kept."""
    overwritten: int = 0
    """Oldest samples, dropped because `capacity` was reached."""
    unreduced: int = 0
    """Calls whose statistics could not be computed, for example for lack of memory."""
    padding_unknown: int = 0
    """Forwards whose attention mask does not show which of the tokens seen by the routers are padding (4-D, a
    static cache, blocks that receive part of the tokens)."""
    misread: dict[str, str] = field(default_factory=dict)
    """Routers with unreadable calls: module path -> why the first one could not be read."""
    never_called: tuple[str, ...] = ()
    """Routers that were found but not called while the tracer was active."""
    silent_forwards: int = 0
    """Forwards due to be recorded in which no router call was seen although code was compiled: at least this
    many ran without hooks, or without any MoE layer."""
    calls_seen: dict[str, int] = field(default_factory=dict)
    """Router calls seen by the hooks, by module path: each is either recorded or counted in `calls`."""
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    """Router calls seen by the hooks but missing from the recording: module path -> reason -> count. Includes
    `overwritten` and `unreduced`; `notes_of` explains the other reasons."""
    not_reached: dict[str, int] = field(default_factory=dict)
    """Forwards that did not reach the hooks of a router that earlier forwards did, by module path."""
    experts_without_router: int = 0
    """Calls of experts modules that belong to no router call."""
    hook_failure: str | None = None
    """First error raised in one of moe_trace's hooks; calls of that forward may be missing."""
    unplaced: dict[str, int] = field(default_factory=dict)
    """Number of profiled calls inside graphs whose place in the trace is unknown, by reason."""
    untimed: dict[str, int] = field(default_factory=dict)
    """Number of calls inside graphs that have a place, but no router latency, by reason."""


ExpertExchange = Literal["all_to_all", "all_reduce"]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The role of one process in a distributed run; ranks are global."""

    mesh: dict[str, int]
    """Sizes of the device mesh's dimensions, except those of size 1: `dp` (serving engines), `dp_replicate`,
    `fsdp`, `tp`, `ep`, `etp` (tensor parallelism of the experts, if it differs), `pp`."""
    token_ranks: tuple[int, ...]
    """Ranks whose routers see the same tokens as this rank's, including itself, ascending. Their counts are
    one decision, to be counted once."""
    expert_ranks: tuple[int, ...] = ()
    """Ranks of the expert-parallel group in shard order; empty if every rank has all experts."""
    expert_exchange: ExpertExchange | None = None
    """Collective that exchanges tokens between experts; None without expert parallelism."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """Everything recorded about one model, or contained in one trace file."""

    model: dict[str, Any]
    """`name`, `class`, `num_layers`, `num_parameters`, `dtype`, `device`."""
    options: dict[str, Any]
    """`layers`, `every`, `warmup`, `capacity` of the tracer."""
    routers: tuple[RouterInfo, ...]
    samples: Sequence[RoutingSample]
    """Router calls; any sequence is converted to a `CallTable`."""
    lost: Lost
    rank: int = 0
    world_size: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    parallel: Parallel | None = None
    """None if the process runs alone or its role is unknown."""
    graph_marks: tuple[GraphMark, ...] = ()
    """Counts of forwards that only the device saw, in order of time."""
    captured_graphs: tuple[CapturedGraph, ...] = ()
    graphs_compiled: bool = False
    """Whether `torch.compile` made graphs that record, in addition to manually captured ones."""
    annotated_nodes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Range name -> ids of its nodes in graphs captured with annotations; in the trace as `graph node id`."""
    routes: str | None = None
    """Path of the file with the routes of each token, relative to the trace; None if not recorded."""

    compiled_graphs: tuple[CompiledGraph, ...] = ()
    """Graphs that `torch.compile` made while the tracer was active, by the compiler's provenance."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", CallTable.of(self.samples))

    @property
    def calls(self) -> CallTable:
        """The samples as columns."""
        assert isinstance(self.samples, CallTable)
        return self.samples

    @property
    def experts_are_split(self) -> bool:
        """Whether this process computes other slots than its routers assigned, or a part of each, so that the
        time of its experts does not correspond to the FLOPs of its calls."""
        parallel = self.parallel
        if parallel is None:
            return False
        return bool(parallel.expert_ranks) or max(parallel.mesh.get(dim, 1) for dim in ("tp", "etp")) > 1
