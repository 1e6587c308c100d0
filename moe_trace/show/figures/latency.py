"""Figures of how long a call takes, per layer: its router, and the phases of its MoE block."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.summary import Distribution
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.time.layers import LayerPhases, PhaseReport
from moe_trace.read.time.structure import PHASES
from moe_trace.show.figures.figure import PHASE_COLOURS, Figure, Spec, layer_columns, safe

CLOCKS = (
    ("host", "host", "#0072B2"),
    ("device span", "device_span", "#E69F00"),
    ("device busy", "device_busy", "#009E73"),
)
"""Heading, attribute of the latency, colour."""


def latency(summary: TraceSummary) -> Figure:
    """Router latency per layer."""
    routers = [r for r in summary.routers if r.latency.host is not None]
    sites = [safe(r.info.site) for r in routers]
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
        "Device busy: the kernels alone. Whiskers reach to the 95th percentile.",
        data=data,
        layout={
            "barmode": "group",
            "xaxis": layer_columns(),
            "yaxis": {"title": {"text": "µs"}, "rangemode": "tozero"},
            "height": 360,
        },
        headings=("layer", "calls", *headings),
        rows=rows,
    )


def _median_bars(name: str, sites: Sequence[str], found: Sequence[Distribution | None], colour: str) -> Spec:
    """Bars at the median, with whiskers up to the 95th percentile."""
    return {
        "type": "bar",
        "name": name,
        "x": sites,
        "y": [d.p50 if d is not None else None for d in found],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [d.p95 - d.p50 if d is not None else 0 for d in found],
            "arrayminus": [0] * len(found),
            "thickness": 1,
            "color": "#888888",
        },
        "marker": {"color": colour},
    }


def phase_figures(report: PhaseReport) -> list[Figure]:
    """Stacked bars per layer: forward with gaps, and backward where there is any."""
    clock = "device time" if report.whole.on_device else "host time"
    found = [
        _phase_figure(
            report,
            key="phases",
            title="Phases of an MoE call, forward",
            caption=f"Mean {clock} of one call. A gap is time in which nothing of the block ran.",
            backward=False,
        )
    ]
    if report.total.backward is not None:
        found.append(
            _phase_figure(
                report,
                key="phases-backward",
                title="Phases of an MoE call, backward",
                caption=f"Mean {clock} of the backward nodes of one call's operators.",
                backward=True,
            )
        )
    return found


def _phase_figure(report: PhaseReport, *, key: str, title: str, caption: str, backward: bool) -> Figure:
    values = [_phase_us(layer, report, backward=backward) for layer in report.layers]
    names = [*PHASES, *([] if backward else ["gap"])]
    used = [name for name in names if any(layer[name] for layer in values)]
    data = [
        {
            "type": "bar",
            "name": name,
            "x": [safe(layer.site) for layer in report.layers],
            "y": [round(layer[name], 3) for layer in values],
            "marker": {"color": PHASE_COLOURS[name]},
            "hovertemplate": f"{name}: %{{y:.1f}} µs<extra>%{{x}}</extra>",
        }
        for name in used
    ]
    return Figure(
        key=key,
        title=title,
        caption=caption,
        data=data,
        layout={
            "barmode": "stack",
            "legend": {"traceorder": "normal"},
            "xaxis": layer_columns(),
            "yaxis": {"title": {"text": "µs a call"}},
            "height": 360,
        },
        headings=("layer", *(f"{name} µs" for name in used)),
        rows=[
            (layer.site, *(row[name] for name in used))
            for layer, row in zip(report.layers, values, strict=True)
        ],
    )


def _phase_us(layer: LayerPhases, report: PhaseReport, *, backward: bool) -> dict[str, float]:
    times = layer.backward if backward else layer.forward
    found: dict[str, float] = {}
    for phase in PHASES:
        time = times[phase] if times is not None else None
        us = 0.0
        if time is not None:
            us = (time.device_busy_us or 0.0) if report.whole.on_device else time.host_us
        found[phase] = us / max(1, layer.count("backward" if backward else "forward"))
    if not backward:
        gap = layer.device_gap_us if layer.device_gap_us is not None else layer.host_gap_us
        found["gap"] = gap / max(1, layer.calls)
    return found
