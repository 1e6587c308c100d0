"""Figure of how long a call of the router takes, per layer."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.summary import Distribution
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.time.layers import PhaseReport
from moe_trace.show.figures.figure import Figure, Spec, bars, bars_layout

CLOCKS = (
    ("host", "host", "#0072B2"),
    ("device span", "device_span", "#E69F00"),
    ("device busy", "device_busy", "#009E73"),
)
"""Heading, attribute of the latency, colour."""


def inside_compiled(report: PhaseReport | None) -> str:
    """The mark alone, where another figure gives the shares."""
    known = report is not None and report.provenance is not None
    return f" Inside compiled code {BY_COMPILER}." if known else ""


def latency(summary: TraceSummary) -> Figure:
    """Router latency per layer."""
    routers = [r for r in summary.routers if r.latency.host is not None]
    sites = [r.info.site for r in routers]
    data, columns = [], []
    for title, name, colour in CLOCKS:
        found = [getattr(r.latency, name) for r in routers]
        if any(d is not None for d in found):
            columns.append((title, [(d.p50, d.p95) if d is not None else (None, None) for d in found]))
            data.append(_median_bars(f"{title}, p50 (to p95)", sites, found, colour))
    rows = [
        (r.info.site, r.calls, *(value for _, values in columns for value in values[i]))
        for i, r in enumerate(routers)
    ]
    headings = [f"{title} {p} µs" for title, _ in columns for p in ("p50", "p95")]
    return Figure(
        key="latency",
        title="Router latency",
        caption="One call of the router. Host: its range. Device span: first to last kernel, gaps included. "
        "Device busy: the kernels alone. Whiskers reach to the 95th percentile."
        + inside_compiled(summary.phases),
        data=data,
        layout=bars_layout("µs", 360, barmode="group"),
        headings=("layer", "calls", *headings),
        rows=rows,
    )


def _median_bars(name: str, sites: Sequence[str], found: Sequence[Distribution | None], colour: str) -> Spec:
    """Bars at the median, with whiskers up to the 95th percentile."""
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": [d.p95 - d.p50 if d is not None else 0 for d in found],
        "arrayminus": [0] * len(found),
        "thickness": 1,
        "color": "#888888",
    }
    medians = [d.p50 if d is not None else None for d in found]
    return bars(name, sites, medians, colour, "", error_y=whiskers)
