"""The table that `MoEProfiler.print_summary` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from moe_trace.data.display.columns import Cell, Column, count_column, text_table
from moe_trace.data.display.tables import fixed, printable, wrapped
from moe_trace.simple.metrics import RouterMetrics


def render_metrics(model_name: str, metrics: Mapping[str, RouterMetrics], notes: Sequence[str]) -> str:
    """A line per router that was called, and every note; text of at most 80 columns a line."""
    called = [router for router in metrics.values() if router.samples]
    parts = [printable(model_name)]
    if called:
        parts.append(_table(called))
        parts.append(_explain({row.latency_clock for router in called for row in router.rows}))
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


def _explain(clocks: set[str]) -> str:
    told = {"host": "the host's clock", "cuda_event": "CUDA events on the stream"}
    by = " and ".join(told[c] for c in sorted(clocks))
    return f"Latency (p50, p95) of one call of the router in ms, by {by}."
