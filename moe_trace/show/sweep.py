"""Several runs side by side as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_trace.data.display.tables import fixed, number, printable, scaled, table
from moe_trace.data.summary import RouterSummary, Summary

_ROUTING = ("run", "tokens", "max÷mean", "load entropy", "router entropy", "confidence")
_TIME = ("run", "host µs", "device µs", "FLOP")


def render_comparison(runs: Sequence[tuple[str, Summary]]) -> str:
    """A row per run: means over its routers; latencies and work for one router call."""
    routing = table(_ROUTING, [[printable(name, 16), *_routing(summary)] for name, summary in runs])
    time = table(_TIME, [[printable(name, 16), *_time(summary)] for name, summary in runs])
    return (
        f"Comparison (means over routers, tokens a call, router entropy in nats)\n{routing}\n\n"
        f"Router p50 on host and device, and FLOP a call\n{time}\n"
    )


def _routing(summary: Summary) -> list[str]:
    return [
        fixed(_mean(summary, lambda r: r.tokens / r.calls), 0),
        fixed(_mean(summary, lambda r: r.load.max_over_mean), 2),
        fixed(_mean(summary, lambda r: r.load.entropy), 3),
        fixed(_mean(summary, lambda r: r.decisions.entropy_mean), 3),
        fixed(_mean(summary, lambda r: r.decisions.confidence_mean), 3),
    ]


def _time(summary: Summary) -> list[str]:
    return [
        number(_mean(summary, lambda r: r.latency.host.p50 if r.latency.host else None)),
        number(_mean(summary, lambda r: r.latency.device_span.p50 if r.latency.device_span else None)),
        scaled(_mean(summary, lambda r: r.flops.total / (r.calls + r.recomputed_calls))),
    ]


def _mean(summary: Summary, metric: Callable[[RouterSummary], float | None]) -> float | None:
    values = [value for router in summary.routers if router.calls and (value := metric(router)) is not None]
    return sum(values) / len(values) if values else None
