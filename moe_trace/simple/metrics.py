"""Metrics of the simple interface: a row per router call, and a flat dict per router. Does not import torch.

Unknown values are NaN, never 0 or text: memory on a CPU, confidence of a router without true logits, and all
metrics of a router that was not called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moe_trace.data.calls.table import CallTable, mean_over_tokens
from moe_trace.data.display.columns import (
    DEFINITIONS,
    Cell,
    Column,
    as_column,
    columns_of_fields,
    count_column,
    text_table,
)
from moe_trace.data.display.csv import csv_text
from moe_trace.data.display.tables import fixed, printable, wrapped
from moe_trace.data.load_stats import describe_load
from moe_trace.data.schema import Phase, RouterInfo, RoutingSample
from moe_trace.data.summary import distribution

NAN = float("nan")
MIB = 2**20
_LATENCY = ("mean", "std", "min", "max", "p50", "p95", "p99")


@dataclass(frozen=True, kw_only=True)
class CallRow:
    """One call of one router: a row of the CSV, whose columns are the fields in this order."""

    step: int = field(metadata=as_column("step", "The tracer's step that the call is of."))
    layer: int = field(metadata=as_column("layer index", "Index of the layer in the model."))
    name: str = field(metadata=as_column("router", "Path of the router's module."))
    tokens: int = field(metadata=as_column("tokens", "Rows that the router saw, padding included.", "tokens"))
    flops_total: int = field(
        metadata=as_column("FLOP", "Of the whole call: router and routed experts.", "FLOP")
    )
    flops_router: int = field(metadata=as_column("router FLOP", "Of the call, by formula.", "FLOP"))
    flops_expert: int = field(
        metadata=as_column("experts FLOP", "Of the routed experts, by formula.", "FLOP")
    )
    active_experts: int = field(
        metadata=as_column("active", "Experts that got at least one assignment.", "experts")
    )
    k_avg: float = field(metadata=as_column("k", "Assignments per token."))
    latency_ms: float = field(metadata=as_column("router ms", "Of the router, by `latency_clock`.", "ms"))
    router_conf: float = field(metadata=as_column("router confidence", DEFINITIONS["router confidence"]))
    load_max_over_mean: float = field(metadata=as_column("max÷mean", DEFINITIONS["max÷mean"]))
    memory_mb: float = field(
        metadata=as_column("memory", "What torch's allocator held on the device; NaN on a CPU.", "MiB")
    )
    timestamp: float = field(metadata=as_column("timestamp", "Unix time when the router was called.", "s"))
    device: str = field(metadata=as_column("device"))
    latency_clock: str = field(
        metadata=as_column("clock", "`cuda_event` (what passed on the stream) or `host`.")
    )
    experts_ms: float = field(
        metadata=as_column("experts ms", "Of the experts module, by the same clock.", "ms")
    )
    phase: Phase = field(
        metadata=as_column(
            "pass", "recompute: gradient checkpointing ran the forward again. It counts in no load."
        )
    )


COLUMNS = columns_of_fields(CallRow)
"""Mapping from name in the CSV and in data frames to label, definition and unit."""


@dataclass(frozen=True)
class RouterMetrics:
    """All recorded calls of one router."""

    info: RouterInfo
    samples: tuple[RoutingSample, ...]
    """Samples as returned by `MoETracer.samples()`."""
    rows: tuple[CallRow, ...]
    """One row per sample, in the same order."""

    def get_summary(self) -> dict[str, float]:
        """Return metrics over all calls, NaN where unknown. Standard deviations are of the population.

        - `flops_total_mean`, `_std`, `_p50`, `_p95`, `_p99`, `flops_router_mean`, `flops_expert_mean`: FLOPs
          **per token**, distributed over calls; a gated expert counts with its three matrices. `flops_total`,
          `flops_router`, `flops_expert`: sums over all calls.
        - `latency_mean_ms`, `_std_`, `_min_`, `_max_`, `_p50_`, `_p95_`, `_p99_`: latency of a router call in
          milliseconds, recomputed calls included.
        - `active_experts_mean`, `_std`: experts with an assignment, over calls.
        - `k_mean`, `_std`, `_min`, `_max`: experts that a token actually used, over tokens.
        - `expert_load_mean`, `_std`: assignments per expert, over experts, all calls together; `_cv` is their
          ratio, `_gini` is 0 and `_entropy` 1 for an even load.
        - `router_confidence_mean`, `_std`: 1 - H / ln E, the mean over tokens; the deviation is that of the
          calls' means, weighted by tokens.
        - `memory_mean_mb`, `memory_max_mb`: MiB on the device, over calls; NaN on a CPU.
        - `total_steps`, `total_tokens`: steps with a call, and tokens over all calls.
        """
        calls = CallTable.of(self.samples)
        forward = calls.take(calls.forward)
        return {
            **_flops(calls),
            **_spread("latency", (row.latency_ms for row in self.rows), *_LATENCY, unit="_ms"),
            **_spread("active_experts", forward.assignments.used(), "mean", "std"),
            **_k_statistics(forward),
            **_load(forward),
            **_confidence(forward),
            **_spread("memory", (row.memory_mb for row in self.rows), "mean", "max", unit="_mb"),
            "total_steps": len(np.unique(forward.step)),
            "total_tokens": forward.total("tokens"),
        }


def call_row(
    sample: RoutingSample, *, device: str, clock: str, latency_ms: float, experts_ms: float
) -> CallRow:
    """Return the row of a sample with the given times."""
    load = describe_load(sample.assignments)
    return CallRow(
        step=sample.step,
        layer=sample.layer,
        name=sample.name,
        tokens=sample.tokens,
        flops_total=sample.router_flops + sample.expert_flops,
        flops_router=sample.router_flops,
        flops_expert=sample.expert_flops,
        active_experts=load.active_experts,
        k_avg=int(sample.assignments.sum()) / sample.tokens if sample.tokens else NAN,
        latency_ms=latency_ms,
        router_conf=_number(sample.confidence),
        load_max_over_mean=_number(load.max_over_mean),
        memory_mb=_number(sample.memory_allocated_bytes) / MIB,
        timestamp=sample.host_start_ns / 1e9,
        device=device,
        latency_clock=clock,
        experts_ms=experts_ms,
        phase=sample.phase,
    )


def rows_to_csv(rows: Iterable[CallRow]) -> str:
    """Return the rows as CSV text with a header; cells of unknown values are empty."""
    return csv_text(tuple(COLUMNS), ([getattr(row, name) for name in COLUMNS] for row in rows))


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def _flops(calls: CallTable) -> dict[str, float]:
    used = calls.take(calls.tokens > 0)
    router, expert = used.router_flops / used.tokens, used.expert_flops / used.tokens
    return {
        **_spread("flops_total", router + expert, "mean", "std", "p50", "p95", "p99"),
        **_spread("flops_router", router, "mean"),
        **_spread("flops_expert", expert, "mean"),
        "flops_total": calls.total("router_flops") + calls.total("expert_flops"),
        "flops_router": calls.total("router_flops"),
        "flops_expert": calls.total("expert_flops"),
    }


def _k_statistics(calls: CallTable) -> dict[str, float]:
    """Compute the statistics from histograms, since k is a property of a token, not of a call."""
    tokens_K = calls.lists["k_histogram"].summed()
    if not tokens_K.sum():
        return dict.fromkeys(("k_mean", "k_std", "k_min", "k_max"), NAN)
    k = np.arange(len(tokens_K))
    mean = float(np.average(k, weights=tokens_K))
    seen = np.flatnonzero(tokens_K)
    return {
        "k_mean": mean,
        "k_std": math.sqrt(float(np.average((k - mean) ** 2, weights=tokens_K))),
        "k_min": int(seen[0]),
        "k_max": int(seen[-1]),
    }


def _load(calls: CallTable) -> dict[str, float]:
    loads_E = calls.assignments.summed()
    load = describe_load(loads_E)
    return {
        **_spread("expert_load", loads_E, "mean", "std"),
        "expert_load_cv": _number(load.cv),
        "expert_load_gini": _number(load.gini),
        "expert_load_entropy": _number(load.entropy),
    }


def _confidence(calls: CallTable) -> dict[str, float]:
    mean = mean_over_tokens(calls, "confidence")
    if mean is None:
        return {"router_confidence_mean": NAN, "router_confidence_std": NAN}
    calls = calls.take(~np.isnan(calls.confidence))
    values, tokens = calls.confidence, calls.tokens - calls.nonfinite_tokens
    deviation = math.sqrt(float(np.average((values - mean) ** 2, weights=tokens)))
    return {"router_confidence_mean": mean, "router_confidence_std": deviation}


def _spread(name: str, values: Iterable[float], *figures: str, unit: str = "") -> dict[str, float]:
    """Return statistics (fields of `Distribution`) of the known values."""
    found = distribution(value for value in values if value == value)
    return {f"{name}_{figure}{unit}": NAN if found is None else getattr(found, figure) for figure in figures}


def render_metrics(model_name: str, metrics: Mapping[str, RouterMetrics], notes: Sequence[str]) -> str:
    """Render a line per router that was called, and all notes, in lines of at most 80 columns."""
    called = [router for router in metrics.values() if router.samples]
    parts = [printable(model_name)]
    if called:
        parts.append(_table(called))
        parts.append(_latency_description({row.latency_clock for router in called for row in router.rows}))
    if notes:
        parts.append("Notes\n" + "\n".join(wrapped(printable(note, 2000)) for note in notes))
    return "\n\n".join(parts) + "\n"


def _table(routers: Sequence[RouterMetrics]) -> str:
    k, flops = Column("k", terminal=partial(fixed, decimals=2)), count_column("FLOP/token")
    headings = ("layer", "calls", "tokens", k, "active", "CV", "confidence", "p50", "p95", flops)
    return text_table(headings, [_row(router) for router in routers])


def _row(router: RouterMetrics) -> tuple[Cell, ...]:
    known = router.get_summary()
    figures = (
        "expert_load_cv",
        "router_confidence_mean",
        "latency_p50_ms",
        "latency_p95_ms",
        "flops_total_mean",
    )
    return (
        printable(router.info.site, 16),
        *(len(router.samples), known["total_tokens"], known["k_mean"]),
        f"{fixed(known['active_experts_mean'], 1)}/{router.info.num_experts or '?'}",
        *(known[name] for name in figures),
    )


def _latency_description(clocks: set[str]) -> str:
    descriptions = {"host": "the host's clock", "cuda_event": "CUDA events on the stream"}
    clock_names = " and ".join(descriptions[c] for c in sorted(clocks))
    return f"Latency (p50, p95) of one call of the router in ms, by {clock_names}."
