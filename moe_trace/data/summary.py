"""From a recording to the figures per router: frozen dataclasses, no text, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_trace.data.loads import Load, describe_load
from moe_trace.data.schema import Lost, Recording, RouterInfo, RoutingSample
from moe_trace.data.summary_notes import notes_of

SampleKey = tuple[str, int]
"""(module path of the router, call)"""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A distribution over calls, in microseconds; population standard deviation, linear percentiles."""

    mean: float
    std: float
    min: float
    max: float
    p50: float
    p95: float
    p99: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long the router took, by three clocks; None where the trace does not tell."""

    host: Distribution | None
    """Duration of the router's range on the host (without a trace: between its hooks)."""
    device_span: Distribution | None
    """From its first kernel to its last, gaps included."""
    device_busy: Distribution | None
    """Sum of the kernels launched inside the range."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Means over the tokens of all calls; None without true logits."""

    entropy_mean: float | None
    confidence_mean: float | None
    top1_prob_mean: float | None
    topk_mass_mean: float | None
    z_loss_mean: float | None
    k_mean: float | None
    k_histogram: tuple[int, ...]
    aux_loss_mean: float | None = None
    """Mean over calls of the load balancing loss (`RoutingSample.aux_loss`)."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations over all calls."""

    router: int
    experts: int
    shared: int = 0
    """Of the always-on experts beside the routed ones; not part of the total."""

    @property
    def total(self) -> int:
        """Of router and routed experts."""
        return self.router + self.experts


@dataclass(frozen=True, kw_only=True)
class RouterSummary:
    """One router over all its recorded calls. Recomputed calls count in latency, never in the load."""

    info: RouterInfo
    calls: int
    recomputed_calls: int
    tokens: int
    assignments: tuple[int, ...]
    skipped: int
    padding_assignments: int
    nonfinite_tokens: int
    load: Load
    decisions: Decisions
    latency: Latency
    flops: Flops
    memory_max_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Over all routers."""

    routers: int
    calls: int
    steps: int
    tokens: int
    """Router calls x their tokens: a token counts once per MoE layer."""
    assignments: int
    skipped: int
    padding_assignments: int
    nonfinite_tokens: int
    load_max_over_mean_mean: float | None
    """Mean over routers of each one's load max÷mean."""
    router_host_us: float | None
    flops_router: int
    flops_experts: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was recorded, per router and in all."""

    trace: str | None
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    rank: int
    versions: Mapping[str, str]
    lost: Lost
    routers: tuple[RouterSummary, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    """What a reader must know before trusting the figures."""


def summarize(
    recording: Recording,
    *,
    trace: str | None = None,
    device_busy_us: Mapping[SampleKey, float] | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """Reduce a recording to its figures.

    Args:
        trace: path of the file it came from.
        device_busy_us: kernel time inside each router range, where a trace was read for it.
        notes: added to the summary's own.
    """
    by_router: dict[str, list[RoutingSample]] = {router.name: [] for router in recording.routers}
    for sample in recording.samples:
        by_router[sample.name].append(sample)
    routers = tuple(
        _summarize_router(router, by_router[router.name], device_busy_us or {})
        for router in recording.routers
    )
    return Summary(
        trace=trace,
        model=recording.model,
        options=recording.options,
        rank=recording.rank,
        versions=recording.versions,
        lost=recording.lost,
        routers=routers,
        totals=_totals(routers, recording.samples),
        notes=(*notes_of(recording), *notes),
    )


def _summarize_router(
    info: RouterInfo, samples: Sequence[RoutingSample], busy_us: Mapping[SampleKey, float]
) -> RouterSummary:
    forward = [s for s in samples if s.phase == "forward"]
    assignments = _sum_arrays([s.assignments for s in forward], info.num_experts)
    memory = [s.memory_allocated_bytes for s in samples if s.memory_allocated_bytes is not None]
    return RouterSummary(
        info=info,
        calls=len(forward),
        recomputed_calls=len(samples) - len(forward),
        tokens=sum(s.tokens for s in forward),
        assignments=tuple(assignments.tolist()),
        skipped=sum(s.skipped for s in forward),
        padding_assignments=sum(s.padding_assignments for s in forward),
        nonfinite_tokens=sum(s.nonfinite_tokens for s in forward),
        load=describe_load(assignments),
        decisions=_decisions(forward, info.top_k),
        latency=_latency(samples, busy_us),
        flops=Flops(
            router=sum(s.router_flops for s in samples),
            experts=sum(s.expert_flops for s in samples),
            shared=info.shared_flops_per_token * sum(s.tokens for s in samples),
        ),
        memory_max_bytes=max(memory, default=None),
    )


def _sum_arrays(arrays: Sequence[np.ndarray], least: int) -> np.ndarray:
    total = np.zeros(max([least, *map(len, arrays)]), dtype=np.int64)
    for array in arrays:
        total[: len(array)] += array
    return total


def _decisions(samples: Sequence[RoutingSample], top_k: int) -> Decisions:
    histogram = _sum_arrays([s.k_histogram for s in samples], top_k + 1)
    tokens = int(histogram.sum())
    k_mean = float((histogram * np.arange(len(histogram))).sum() / tokens) if tokens else None
    return Decisions(
        entropy_mean=_mean_over_tokens(samples, "router_entropy"),
        confidence_mean=_mean_over_tokens(samples, "confidence"),
        top1_prob_mean=_mean_over_tokens(samples, "top1_prob"),
        topk_mass_mean=_mean_over_tokens(samples, "topk_mass"),
        z_loss_mean=_mean_over_tokens(samples, "z_loss"),
        k_mean=k_mean,
        k_histogram=tuple(histogram.tolist()),
        aux_loss_mean=_mean_over_calls(samples, "aux_loss"),
    )


def _mean_over_tokens(samples: Sequence[RoutingSample], figure: str) -> float | None:
    """Each call's mean weighted by the tokens that went into it."""
    weighted = [
        (value, s.tokens - s.nonfinite_tokens) for s in samples if (value := getattr(s, figure)) is not None
    ]
    tokens = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / tokens if tokens else None


def _mean_over_calls(samples: Sequence[RoutingSample], figure: str) -> float | None:
    values = [value for s in samples if (value := getattr(s, figure)) is not None]
    return sum(values) / len(values) if values else None


def _latency(samples: Sequence[RoutingSample], busy_us: Mapping[SampleKey, float]) -> Latency:
    busy = [busy_us[s.name, s.call] for s in samples if (s.name, s.call) in busy_us]
    return Latency(
        # A fused block gives its router no time of its own.
        host=distribution(us for us in map(host_us, samples) if us > 0),
        device_span=distribution(
            s.placement.device["router"].duration_us
            for s in samples
            if s.placement is not None and "router" in s.placement.device
        ),
        device_busy=distribution(busy),
    )


def host_us(sample: RoutingSample) -> float:
    """Host time of a router call: its range in the trace, or the clock between its hooks."""
    if sample.placement is not None and "router" in sample.placement.host:
        return sample.placement.host["router"].duration_us
    return (sample.host_end_ns - sample.host_start_ns) / 1000


def distribution(values: Iterable[float]) -> Distribution | None:
    """None where there are no values."""
    array = np.fromiter(values, dtype=np.float64)
    if not len(array):
        return None
    p50, p95, p99 = (float(p) for p in np.percentile(array, (50, 95, 99)))
    return Distribution(
        mean=float(array.mean()),
        std=float(array.std()),
        min=float(array.min()),
        max=float(array.max()),
        p50=p50,
        p95=p95,
        p99=p99,
        total=float(array.sum()),
    )


def _totals(routers: Sequence[RouterSummary], samples: Sequence[RoutingSample]) -> Totals:
    loads = [r.load.max_over_mean for r in routers if r.load.max_over_mean is not None]
    host = [r.latency.host.total for r in routers if r.latency.host is not None]
    return Totals(
        routers=len(routers),
        calls=sum(r.calls for r in routers),
        steps=len({s.step for s in samples}),
        tokens=sum(r.tokens for r in routers),
        assignments=sum(sum(r.assignments) for r in routers),
        skipped=sum(r.skipped for r in routers),
        padding_assignments=sum(r.padding_assignments for r in routers),
        nonfinite_tokens=sum(r.nonfinite_tokens for r in routers),
        load_max_over_mean_mean=sum(loads) / len(loads) if loads else None,
        router_host_us=sum(host) if host else None,
        flops_router=sum(r.flops.router for r in routers),
        flops_experts=sum(r.flops.experts for r in routers),
    )
