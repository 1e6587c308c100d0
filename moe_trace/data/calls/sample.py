"""Record of one router call: the router's decision and the call's place in the trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moe_trace.data.display.notebook import ShortRepr, ShownInNotebooks

RangeKind = Literal["router", "experts", "block", "graph"]
RANGE_KINDS: tuple[RangeKind, ...] = ("router", "experts", "block", "graph")
"""`graph` surrounds a forward of a model with compiled parts; its label is the model's class."""

Phase = Literal["forward", "recompute"]
Stage = Literal["prefill", "decode", "train", "mixed"]
STAGES: tuple[Stage, ...] = ("prefill", "decode", "train", "mixed")
"""`mixed`: prefill and decode tokens in one forward, as batched by servers."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """An interval on the trace's clock, in microseconds."""

    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us

    def holds(self, time_us: float) -> bool:
        """Return whether a time lies in the interval, ends included."""
        return self.start_us <= time_us <= self.end_us


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Place of one router call in the trace: spans by range kind, on the host and on the device."""

    host: dict[RangeKind, Span]
    """Ranges of moe_trace; in code compiled for a CPU, first to last operator of a router or of experts."""
    device: dict[RangeKind, Span]
    """First to last kernel of the range, gaps included (Kineto's `gpu_user_annotation`); empty on a CPU. The
    block's span covers its own kernels and those of its router and experts."""
    busy_us: dict[RangeKind, float] = field(default_factory=dict)
    """Sum of the kernels of a router, or of experts, inside compiled code or a CUDA graph, where no range
    covers them; on a CPU, of the operators."""

    @property
    def in_graph(self) -> bool:
        """Whether the call is placed with its graph. `graph` on the host is then the launch of the graph if
        one launch made the call, else the range around the forward; on the device, its kernels."""
        return "graph" in self.host


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RoutingSample(ShortRepr, ShownInNotebooks):
    """Decision of one router in one call. E experts, K slots per token, T tokens."""

    site: str
    name: str
    layer: int
    call: int
    """0, 1, 2 ... per router, over the recorded calls."""
    step: int
    phase: Phase
    """`recompute` if gradient checkpointing ran the forward again; never added to the load."""
    stage: Stage
    tokens: int
    """T: number of rows that the router saw, padding included."""
    top_k: int
    assignments: npt.NDArray[np.int64]
    """[E] number of slots that chose each expert; sums to tokens * top_k - skipped."""
    skipped: int
    """Slots with an index outside [0, E) or a weight of exactly 0."""
    computed_slots: int
    """Slots whose expert actually ran (a slot of weight 0 is computed as well); the basis of FLOPs."""
    padding_assignments: int
    """Assignments of padding tokens, according to the model's 2-D attention mask; part of `assignments`."""
    nonfinite_tokens: int
    """Tokens whose logits contain NaN or infinity; excluded from the means below."""
    router_entropy: float | None
    """Mean over tokens of the entropy of softmax(logits), in nats, 0 ... ln E; None without true logits."""
    confidence: float | None
    """1 - router_entropy / ln E."""
    top1_prob: float | None
    """Mean over tokens of the largest softmax probability."""
    topk_mass: float | None
    """Mean over tokens of the softmax probability of the chosen experts, before any renormalisation."""
    z_loss: float | None
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, equation 5)."""
    k_histogram: npt.NDArray[np.int64]
    """[K + 1] number of tokens by the number of slots they used; all zero if unknown."""
    router_flops: int
    expert_flops: int
    memory_allocated_bytes: int | None
    """Device memory allocated by torch when the call was reduced; small calls (decode steps) are reduced some
    60 forwards at a time. None on a CPU."""
    host_start_ns: int
    """`time.time_ns()` just inside the router's range."""
    host_end_ns: int
    thread: int
    """Native id of the thread that ran the router."""
    profiled: bool
    """Whether a profiler was recording."""
    placement: Placement | None = None
    """Set once the sample has been merged into a trace."""
    aux_loss: float | None = None
    """E x sum over experts of (share of tokens assigned, summed over the K slots) x (mean softmax
    probability): Switch Transformer, arXiv:2101.03961, equations 4-6; 1.0 x K when balanced. None without
    true logits over exactly E classes."""
    in_graph: bool = False
    """Whether the call was made inside compiled code or a CUDA graph. The host clock then did not see the
    router: `host_start_ns` = `host_end_ns` is the start of the forward, or 0 if the host saw no call."""
    dispatched: npt.NDArray[np.int64] | None = None
    """[E] slots that this process itself sends to each expert's rank, if fewer than `assignments`: ranks that
    share tokens (tensor parallelism) dispatch a slice each. None means all of `assignments`."""
    graph_forward: int | None = None
    """Number of the forward as counted by the device, where the host saw none begin."""
    slot_bytes: int | None = None
    """Bytes of one token's hidden state as its experts receive it: the traffic of one slot, one way."""
    prefill_tokens: int | None = None
    """Prefill tokens, where a host framework reports them (`MoETracer.describe_tokens`); the same holds for
    the fields below. tokens - prefill_tokens - decode_tokens are padding."""
    decode_tokens: int | None = None
    prefill_assignments: npt.NDArray[np.int64] | None = None
    """[E] assignments of prefill tokens; with those of decode and padding tokens they are `assignments`."""
    decode_assignments: npt.NDArray[np.int64] | None = None
    requests: int | None = None
    """Number of requests that the tokens belong to."""
    prefill_requests: int | None = None
    """Number of those requests with a prefill token."""
    slot_assignments: npt.NDArray[np.int64] | None = None
    """[P] assignments per physical slot, where a load balancer places experts on slots
    (`RouterInfo.num_slots`); summed by `slot_experts` they are `assignments`."""
    slot_experts: npt.NDArray[np.int64] | None = None
    """[P] expert that each slot held in this call; -1 for none."""
