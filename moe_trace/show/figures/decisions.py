"""Figures of decisions: how even and how sure they are over time, and how many slots a token uses."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_trace.data.loads import describe_load
from moe_trace.data.summary import Summary
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.figure import POINTS_MAX, Figure, layer_colour, safe


def load_over_time(summary: TraceSummary) -> Figure:
    """Load max÷mean of each call."""
    return _over_time(
        summary,
        key="load",
        title="Load max÷mean over time",
        caption="The busiest expert's assignments over the mean, one point a call. Short calls (decoding) "
        "are uneven by chance: one token cannot reach all experts.",
        figure=lambda sample: describe_load(sample.assignments).max_over_mean,
        axis="max÷mean",
    )


def entropy_over_time(summary: TraceSummary) -> Figure:
    """Router entropy of each call."""
    return _over_time(
        summary,
        key="entropy",
        title="Router entropy over time",
        caption="How undecided the router is, in nats: 0 is certain, ln E is no preference at all.",
        figure=lambda sample: sample.router_entropy,
        axis="nats",
    )


def _over_time(
    summary: TraceSummary, *, key: str, title: str, caption: str, figure: Any, axis: str
) -> Figure:
    calls: dict[str, list[tuple[float, float]]] = {}
    starts = [s.host_start_ns for s in summary.samples]
    origin = min(starts, default=0)
    for sample in summary.samples:
        value = figure(sample)
        if value is not None and sample.phase == "forward":
            time_ms = (sample.host_start_ns - origin) / 1e6
            calls.setdefault(sample.site, []).append((time_ms, float(value)))
    data, rows = [], []
    for i, (site, points) in enumerate(sorted(calls.items())):
        shown = points[:: max(1, -(-len(points) // POINTS_MAX))]
        values = [value for _, value in points]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(shown) <= 40 else "lines",
                "name": safe(site),
                "x": [round(time_ms, 3) for time_ms, _ in shown],
                "y": [round(value, 5) for _, value in shown],
                "line": {"width": 1.5, "color": layer_colour(i, len(calls))},
                "marker": {"size": 4},
                "hovertemplate": f"{safe(site)}: %{{y:.3f}} at %{{x:.2f}} ms<extra></extra>",
            }
        )
        rows.append((site, len(values), min(values), float(np.mean(values)), max(values)))
    return Figure(
        key=key,
        title=title,
        caption=caption,
        data=data,
        layout={
            "xaxis": {"title": {"text": "ms since the first call"}},
            "yaxis": {"title": {"text": axis}, "rangemode": "tozero"},
            "height": 360,
            "showlegend": len(calls) > 1,
        },
        headings=("layer", "calls", "lowest", "mean", "highest"),
        rows=rows,
    )


def k_histogram(summary: Summary) -> Figure:
    """Tokens by the number of slots that they used."""
    most = max((len(r.decisions.k_histogram) for r in summary.routers), default=0)
    data, rows = [], []
    for i, router in enumerate(summary.routers):
        counts = router.decisions.k_histogram
        if sum(counts):
            total = sum(counts)
            data.append(
                {
                    "type": "bar",
                    "name": safe(router.info.site),
                    "x": list(range(len(counts))),
                    "y": [count / total for count in counts],
                    "marker": {"color": layer_colour(i, len(summary.routers))},
                    "hovertemplate": "%{y:.2%} of tokens use %{x} slots<extra>%{fullData.name}</extra>",
                }
            )
            rows.append((router.info.site, *counts, *[None] * (most - len(counts))))
    return Figure(
        key="k",
        title="Slots used per token",
        caption="Share of tokens by the number of experts that each used: below k, slots were skipped.",
        data=data,
        layout={
            "barmode": "group",
            "xaxis": {"title": {"text": "slots"}, "dtick": 1},
            "yaxis": {"title": {"text": "share of tokens"}, "tickformat": ".0%", "range": [0, 1]},
            "height": 300,
            "showlegend": len(data) > 1,
        },
        headings=("layer", *(f"{k} slots" for k in range(most))),
        rows=rows,
    )
