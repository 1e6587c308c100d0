"""One router call: what the router decided, and where the call stands in the trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moe_trace.data.display.notebook import ShortRepr, ShownInNotebooks

RangeKind = Literal["router", "experts", "block", "graph"]
RANGE_KINDS: tuple[RangeKind, ...] = ("router", "experts", "block", "graph")
"""`graph` stands round a forward of a model that has compiled parts; its label is the model's class."""

Phase = Literal["forward", "recompute"]
Stage = Literal["prefill", "decode", "train", "mixed"]
STAGES: tuple[Stage, ...] = ("prefill", "decode", "train", "mixed")
"""`mixed`: prefill and decode tokens in one forward, as servers batch them."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """An interval on the trace's clock, in microseconds."""

    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us

    def holds(self, time_us: float) -> bool:
        """Whether it was then, its ends included."""
        return self.start_us <= time_us <= self.end_us


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one router call stands in the trace: spans by range kind, on the host and on the device."""

    host: dict[RangeKind, Span]
    """Ranges of ours; of a router and experts in code that was compiled for a CPU, first to last operator."""
    device: dict[RangeKind, Span]
    """First to last kernel of the range, gaps included (Kineto's `gpu_user_annotation`); empty on a CPU.
    That of the block reaches from the first to the last of its own kernels, its router's and its experts'."""
    busy_us: dict[RangeKind, float] = field(default_factory=dict)
    """Sum of the kernels of a router, or of experts, inside compiled code or a CUDA graph, where no range
    tells it; on a CPU, of the operators."""

    @property
    def in_graph(self) -> bool:
        """Whether the call is placed with its graph: `graph` on the host is the launch of its graph where
        one launch made it, else the range round the model's forward; on the device its kernels."""
        return "graph" in self.host


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RoutingSample(ShortRepr, ShownInNotebooks):
    """What one router decided in one call. E experts, K slots per token, T tokens."""

    site: str
    name: str
    layer: int
    call: int
    """0, 1, 2 ... per router, over the calls that were recorded."""
    step: int
    phase: Phase
    """`recompute` when gradient checkpointing ran the forward again; never added to the load."""
    stage: Stage
    tokens: int
    """T: rows that the router saw, padding included."""
    top_k: int
    assignments: npt.NDArray[np.int64]
    """[E] slots that chose each expert; sums to tokens * top_k - skipped."""
    skipped: int
    """Slots with an index outside [0, E) or a weight of exactly 0."""
    computed_slots: int
    """Slots whose expert really ran (a slot of weight 0 is computed all the same): the base of FLOPs."""
    padding_assignments: int
    """Assignments made by padding tokens (the model's 2-D attention mask tells); part of `assignments`."""
    nonfinite_tokens: int
    """Tokens whose logits hold NaN or infinity; left out of the means below."""
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
    """[K + 1] tokens by the number of slots that they really used; all zero where that is not known."""
    router_flops: int
    expert_flops: int
    memory_allocated_bytes: int | None
    """Device memory that torch's allocator held when the call's figures were reduced, for small calls (decode
    steps) some 60 forwards at a time; None on a CPU."""
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
    """Whether it was made inside compiled code or a CUDA graph. Then the host clock did not see the router:
    `host_start_ns` = `host_end_ns` is when the model's forward began, or 0 where the host saw no call."""
    dispatched: npt.NDArray[np.int64] | None = None
    """[E] slots that this process itself sends to each expert's rank, where that is less than `assignments`:
    ranks that share their tokens (tensor parallelism) dispatch a slice each. None: all of `assignments`."""
    graph_forward: int | None = None
    """Which forward it belongs to, as the device counted them; where the host saw none begin."""
    slot_bytes: int | None = None
    """Bytes of one token's hidden state as the experts receive it: what a dispatched slot moves, one way."""
    prefill_tokens: int | None = None
    """Tokens that prefill, where a host framework told (`MoETracer.describe_tokens`), as it told the fields
    below: tokens - prefill_tokens - decode_tokens are padding."""
    decode_tokens: int | None = None
    prefill_assignments: npt.NDArray[np.int64] | None = None
    """[E] those of `assignments` that prefill tokens made; with `decode_assignments` and those of padding
    they are all."""
    decode_assignments: npt.NDArray[np.int64] | None = None
    requests: int | None = None
    """Requests that the tokens are of."""
    prefill_requests: int | None = None
    """Those of them with a prefill token."""
    slot_assignments: npt.NDArray[np.int64] | None = None
    """[P] what each physical slot got of `assignments`, where a load balancer puts experts on slots
    (`RouterInfo.num_slots`); adds up to it by `slot_experts`."""
    slot_experts: npt.NDArray[np.int64] | None = None
    """[P] the expert that each slot held in this call; -1 for none."""
