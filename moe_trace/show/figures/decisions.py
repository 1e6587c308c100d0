"""Figures of decisions: how even and how sure they are over time, and how many experts a token uses."""

from __future__ import annotations

from moe_trace.data.load_stats import max_over_mean
from moe_trace.data.schema import RoutingSample
from moe_trace.data.summary import Summary
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.call_grid import call_grid
from moe_trace.show.figures.figure import Figure, Spec, layer_columns, safe
from moe_trace.show.figures.metric_over_time import Metric, metric_over_time


def load_over_time(summary: TraceSummary) -> Figure:
    """Load max÷mean of each call."""
    metric = Metric(
        key="load",
        title="Load max÷mean",
        unit="max÷mean",
        caption="The busiest expert's assignments over the mean, call by call. Short calls (decoding) are "
        "uneven by chance: one token cannot reach all experts.",
        worst="highest",
    )
    return metric_over_time(call_grid(summary.samples, _max_over_mean), metric)


def _max_over_mean(sample: RoutingSample) -> float | None:
    return max_over_mean(sample.assignments) if sample.assignments.any() else None


def entropy_over_time(summary: TraceSummary) -> Figure:
    """Router entropy of each call."""
    metric = Metric(
        key="entropy",
        title="Router entropy",
        unit="nats",
        caption="How undecided the router is, in nats: 0 is certain, ln E is no preference at all.",
        worst="lowest",
    )
    return metric_over_time(call_grid(summary.samples, lambda sample: sample.router_entropy), metric)


def k_histogram(summary: Summary) -> Figure:
    """Tokens by the number of experts that they used; nothing where each used its layer's k."""
    routers = [r for r in summary.routers if sum(r.decisions.k_histogram)]
    most = max((len(r.decisions.k_histogram) for r in routers), default=0)
    counts_LK = [[*r.decisions.k_histogram, *[0] * (most - len(r.decisions.k_histogram))] for r in routers]
    used = [k for k in range(most) if any(counts[k] for counts in counts_LK)]
    sites = [safe(r.info.site) for r in routers]
    return Figure(
        key="k",
        title="Experts used per token",
        caption="Share of tokens by the number of experts that each used: below k, assignments were skipped.",
        data=[_slots_bar(k, sites, counts_LK) for k in used] if len(used) > 1 else [],
        layout={
            "barmode": "stack",
            "legend": {"traceorder": "normal"},
            "xaxis": layer_columns(),
            "yaxis": {"title": {"text": "share of tokens"}, "tickformat": ".0%", "range": [0, 1]},
            "height": 300,
        },
        headings=("layer", *(f"{k} experts" for k in range(most))),
        rows=[(r.info.site, *counts) for r, counts in zip(routers, counts_LK, strict=True)],
    )


def _slots_bar(k: int, sites: list[str], counts_LK: list[list[int]]) -> Spec:
    return {
        "type": "bar",
        "name": f"{k} experts",
        "x": sites,
        "y": [round(counts[k] / sum(counts), 5) for counts in counts_LK],
        "hovertemplate": f"%{{x}}: %{{y:.2%}} of tokens use {k} experts<extra></extra>",
    }
