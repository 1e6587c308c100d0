"""Comparison of several runs as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from moe_trace.data.display.columns import Column, count_column, text_table
from moe_trace.data.display.tables import fixed
from moe_trace.data.summary import RouterSummary, Summary

_Metric = Callable[[RouterSummary], float | None]
_ROUTING: dict[Column | str, _Metric] = {
    Column("tokens", terminal=partial(fixed, decimals=0)): lambda r: r.tokens / r.calls,
    Column("max÷mean", terminal=partial(fixed, decimals=2)): lambda r: r.load.max_over_mean,
    "load entropy": lambda r: r.load.entropy,
    "router entropy": lambda r: r.decisions.entropy_mean,
    "confidence": lambda r: r.decisions.confidence_mean,
}
_TIME: dict[Column | str, _Metric] = {
    "host µs": lambda r: r.latency.host.p50 if r.latency.host else None,
    "device µs": lambda r: r.latency.device_span.p50 if r.latency.device_span else None,
    count_column("FLOP"): lambda r: r.flops.total / (r.calls + r.recomputed_calls),
}


def render_comparison(runs: Sequence[tuple[str, Summary]]) -> str:
    """Render a row per run: means over its routers; latencies and work per router call."""
    titles = {
        "Comparison (means over routers, tokens a call, router entropy in nats)": _ROUTING,
        "Router p50 on host and device, and FLOP a call": _TIME,
    }
    parts = []
    for title, metrics in titles.items():
        rows = [(name, *(_mean(summary, metric) for metric in metrics.values())) for name, summary in runs]
        parts.append(f"{title}\n{text_table(('run', *metrics), rows)}")
    return "\n\n".join(parts) + "\n"


def _mean(summary: Summary, metric: _Metric) -> float | None:
    values = [value for router in summary.routers if router.calls and (value := metric(router)) is not None]
    return sum(values) / len(values) if values else None
