"""Reduction of a recording to per-router statistics: frozen dataclasses, no text, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_trace.data.calls.stages import requests_per_forward
from moe_trace.data.calls.table import CallTable, mean_over_calls, mean_over_tokens
from moe_trace.data.display.json import attributes
from moe_trace.data.display.notebook import ShortRepr, ShownInNotebooks
from moe_trace.data.errors import optional_package
from moe_trace.data.load_stats import Chance, Load, describe_chance, describe_load
from moe_trace.data.schema import Lost, Recording, RouterInfo
from moe_trace.data.summary_notes import notes_of

SampleKey = tuple[str, int]
"""(module path of the router, call number)"""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Distribution over calls, in microseconds: population standard deviation, linear percentiles."""

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
    """Router latency by three clocks; None where the trace does not contain it."""

    host: Distribution | None
    """Duration of the router's range on the host (without a trace: time between its hooks)."""
    device_span: Distribution | None
    """Time from its first kernel to its last, gaps included."""
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
    """FLOPs of the always-active shared experts; not part of the total."""
    recomputed: int = 0
    """The part of the total spent in recomputed calls."""

    @property
    def total(self) -> int:
        """FLOPs of the router and the routed experts."""
        return self.router + self.experts


@dataclass(frozen=True, kw_only=True, repr=False)
class RouterSummary(ShortRepr):
    """One router over all its recorded calls. Calls recomputed by checkpointing are counted separately."""

    info: RouterInfo
    calls: int
    """Forward calls, on which load, decisions and latency are based."""
    recomputed_calls: int
    tokens: int
    assignments: tuple[int, ...]
    skipped: int
    padding_assignments: int
    nonfinite_tokens: int
    load: Load
    chance: Chance
    decisions: Decisions
    latency: Latency
    """Latency of the forward calls."""
    recompute_latency: Latency
    """Latency of the recomputed calls."""
    flops: Flops
    """FLOPs of forward and recomputed calls."""
    memory_max_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Totals over all routers."""

    routers: int
    calls: int
    steps: int
    tokens: int
    """Tokens of all router calls: a token counts once per MoE layer."""
    assignments: int
    skipped: int
    padding_assignments: int
    nonfinite_tokens: int
    recomputed_calls: int
    load_max_over_mean_mean: float | None
    """Mean over routers of their load max÷mean."""
    router_host_us: float | None
    """Host time of forward and recomputed calls."""
    flops_router: int
    flops_experts: int
    requests_per_forward: float | None = None
    """Mean over forwards; None unless a host framework reports the requests of the tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Summary(ShownInNotebooks):
    """Statistics of a recording, per router and in total."""

    trace: str | None
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    rank: int
    versions: Mapping[str, str]
    lost: Lost
    routers: tuple[RouterSummary, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    """Notes to read before trusting the numbers."""

    def __repr__(self) -> str:
        t = self.totals
        return f"<Summary of {model_name(self.model)}: {t.routers} routers, {t.calls} calls, {t.steps} steps>"

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame, a row per router (`MissingPackage`, an `ImportError`, without
        pandas)."""
        pandas = optional_package("pandas", "to_dataframe()", "pandas")
        return pandas.DataFrame([_flat_router(router) for router in self.routers])


def model_name(model: Mapping[str, Any], most: int = 200) -> str:
    """Return the display name of a recorded model, at most `most` characters long."""
    return str(model.get("name") or model.get("class") or "unnamed model")[:most]


def _flat_router(router: RouterSummary) -> dict[str, Any]:
    info, flops = router.info, router.flops
    row: dict[str, Any] = {"site": info.site, "name": info.name, "layer": info.layer}
    row |= {"calls": router.calls, "recomputed_calls": router.recomputed_calls, "tokens": router.tokens}
    row |= {f"load_{key}": value for key, value in asdict(router.load).items()}
    row |= asdict(router.decisions)
    for clock, times in asdict(router.latency).items():
        row |= {f"router_{clock}_{key}_us": value for key, value in (times or {}).items()}
    row |= {"router_flops": flops.router, "expert_flops": flops.experts}
    return row


def summarize(
    recording: Recording,
    *,
    trace: str | None = None,
    device_busy_us: Mapping[SampleKey, float] | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """Reduce a recording to its statistics.

    Args:
        trace: path of the file it came from.
        device_busy_us: kernel time inside each router range, where a trace was read for it.
        notes: appended to the summary's own notes.
    """
    calls = recording.calls
    routers = tuple(
        _summarize_router(router, calls.take(calls.of_router(router.name)), device_busy_us or {})
        for router in recording.routers
    )
    return Summary(
        trace=trace,
        **attributes(recording, "model", "options", "rank", "versions", "lost"),
        routers=routers,
        totals=_totals(routers, calls),
        notes=(*notes_of(recording), *notes),
    )


def _summarize_router(
    info: RouterInfo, calls: CallTable, busy_us: Mapping[SampleKey, float]
) -> RouterSummary:
    forward = calls.take(calls.forward)
    assignments = forward.assignments.summed(least=info.num_experts)
    recomputed = calls.take(~calls.forward)
    tokens_K = forward.lists["k_histogram"].summed(least=info.top_k + 1)
    memory = [held for held in calls.values("memory_allocated_bytes") if held is not None]
    return RouterSummary(
        info=info,
        calls=len(forward),
        recomputed_calls=len(recomputed),
        tokens=forward.total("tokens"),
        assignments=tuple(assignments.tolist()),
        skipped=forward.total("skipped"),
        padding_assignments=forward.total("padding_assignments"),
        nonfinite_tokens=forward.total("nonfinite_tokens"),
        load=describe_load(assignments),
        chance=describe_chance(assignments, tokens_K),
        decisions=_decisions(forward, info.top_k),
        latency=_latency(forward, busy_us),
        recompute_latency=_latency(recomputed, busy_us),
        flops=Flops(
            router=calls.total("router_flops"),
            experts=calls.total("expert_flops"),
            shared=info.shared_flops_per_token * calls.total("tokens"),
            recomputed=recomputed.total("router_flops") + recomputed.total("expert_flops"),
        ),
        memory_max_bytes=max(memory, default=None),
    )


def _decisions(calls: CallTable, top_k: int) -> Decisions:
    histogram = calls.lists["k_histogram"].summed(least=top_k + 1)
    tokens = int(histogram.sum())
    k_mean = float((histogram * np.arange(len(histogram))).sum() / tokens) if tokens else None
    return Decisions(
        entropy_mean=mean_over_tokens(calls, "router_entropy"),
        confidence_mean=mean_over_tokens(calls, "confidence"),
        top1_prob_mean=mean_over_tokens(calls, "top1_prob"),
        topk_mass_mean=mean_over_tokens(calls, "topk_mass"),
        z_loss_mean=mean_over_tokens(calls, "z_loss"),
        k_mean=k_mean,
        k_histogram=tuple(histogram.tolist()),
        aux_loss_mean=mean_over_calls(calls, "aux_loss"),
    )


def _latency(calls: CallTable, busy_us: Mapping[SampleKey, float]) -> Latency:
    host, device = calls.host_us(), calls.duration_us("device", "router")
    busy = [busy_us[key] for key in calls.call_keys() if key in busy_us]
    return Latency(
        # A router inside a fused block has no time of its own.
        host=distribution(host[host > 0]),
        device_span=distribution(device[~np.isnan(device)]),
        device_busy=distribution(busy),
    )


def distribution(values: Iterable[float]) -> Distribution | None:
    """Return the distribution; None without values."""
    array = np.fromiter(values, dtype=np.float64)
    if not len(array):
        return None
    positions = np.array((0.50, 0.95, 0.99)) * (len(array) - 1)  # `np.percentile` imports more than needed
    p50, p95, p99 = np.interp(positions, np.arange(len(array)), np.sort(array)).tolist()
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


def _totals(routers: Sequence[RouterSummary], calls: CallTable) -> Totals:
    loads = [r.load.max_over_mean for r in routers if r.load.max_over_mean is not None]
    latencies = [latency.host for r in routers for latency in (r.latency, r.recompute_latency)]
    host = [distribution.total for distribution in latencies if distribution is not None]
    return Totals(
        routers=len(routers),
        calls=sum(r.calls for r in routers),
        steps=len(set(calls.step.tolist())),
        tokens=sum(r.tokens for r in routers),
        assignments=sum(sum(r.assignments) for r in routers),
        skipped=sum(r.skipped for r in routers),
        padding_assignments=sum(r.padding_assignments for r in routers),
        nonfinite_tokens=sum(r.nonfinite_tokens for r in routers),
        recomputed_calls=sum(r.recomputed_calls for r in routers),
        load_max_over_mean_mean=sum(loads) / len(loads) if loads else None,
        router_host_us=sum(host) if host else None,
        flops_router=sum(r.flops.router for r in routers),
        flops_experts=sum(r.flops.experts for r in routers),
        requests_per_forward=requests_per_forward(calls),
    )
