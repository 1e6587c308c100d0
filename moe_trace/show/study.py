"""Several runs side by side as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_trace.data.display.tables import fixed, number, printable, scaled, table
from moe_trace.data.summary import RouterSummary, Summary


def render_comparison(runs: Sequence[tuple[str, Summary]]) -> str:
    """A row per run: means over its routers; latencies and work for one router call."""
    headings = ("run", "tokens", "max÷mean", "entropy", "router H", "conf.", "host µs", "device µs", "FLOP")
    rows = [[printable(name, 16), *_row(summary)] for name, summary in runs]
    note = (
        "Comparison (means over routers: tokens a call, load max÷mean and entropy,\n"
        "router entropy in nats and confidence, router p50 on host and device, FLOP a call)"
    )
    return f"{note}\n{table(headings, rows)}\n"


def _row(summary: Summary) -> list[str]:
    routers = [router for router in summary.routers if router.calls]

    def mean(figure: Callable[[RouterSummary], float | None]) -> float | None:
        values = [value for router in routers if (value := figure(router)) is not None]
        return sum(values) / len(values) if values else None

    return [
        fixed(mean(lambda r: r.tokens / r.calls), 0),
        fixed(mean(lambda r: r.load.max_over_mean), 2),
        fixed(mean(lambda r: r.load.entropy), 3),
        fixed(mean(lambda r: r.decisions.entropy_mean), 3),
        fixed(mean(lambda r: r.decisions.confidence_mean), 3),
        number(mean(lambda r: r.latency.host.p50 if r.latency.host else None)),
        number(mean(lambda r: r.latency.device_span.p50 if r.latency.device_span else None)),
        scaled(mean(lambda r: r.flops.total / (r.calls + r.recomputed_calls))),
    ]
