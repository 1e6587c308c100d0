"""Figures of a summary as plain plotly specifications: dicts, without plotly itself.

The HTML report and the TensorBoard tab draw the same ones. Names come from a file, and plotly reads a subset
of HTML in texts, so every name is escaped here. Colours that depend on the theme are left to the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_trace.loads import describe_load
from moe_trace.reading.analysis import TraceSummary
from moe_trace.reading.layers import LayerPhases, PhaseReport
from moe_trace.reading.structure import PHASES
from moe_trace.schema import RoutingSample
from moe_trace.summary import RouterSummary, Summary

Cell = str | int | float | None
Spec = dict[str, Any]

STEPS_MAX = 60  # frames of the heat map; more steps are taken together
POINTS_MAX = 2000  # per line
TABLE_ROWS_MAX = 200

# Okabe and Ito's palette, told apart by readers with any kind of colour vision, on light and dark.
PHASE_COLOURS = {
    "router": "#0072B2",
    "dispatch": "#E69F00",
    "experts": "#009E73",
    "combine": "#CC79A7",
    "shared": "#56B4E9",
    "other": "#999999",
    "gap": "rgba(128,128,128,0.25)",
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One position of a figure's slider."""

    label: str
    z: list[list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot with the words and the table that say the same."""

    key: str
    title: str
    caption: str
    """What is shown and how to read it."""
    data: list[Spec]
    layout: Spec
    headings: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    frames: list[Frame] = field(default_factory=list)
    """For a slider; the first is what `data` shows."""


def figures(summary: Summary) -> list[Figure]:
    """All figures that the summary has data for."""
    found = [expert_heat_map(summary)]
    if isinstance(summary, TraceSummary):
        found += [load_over_time(summary), entropy_over_time(summary), latency(summary)]
        found += phase_figures(summary.phases) if summary.phases is not None else []
    found.append(k_histogram(summary))
    return [figure for figure in found if figure.data]


def safe(name: object) -> str:
    """A name fit for a plotly text."""
    return html.escape(str(name)[:80])


# -- load ---------------------------------------------------------------------------------------------


def expert_heat_map(summary: Summary) -> Figure:
    """Layers x experts: each expert's assignments over the mean of its layer."""
    routers = [r for r in summary.routers if sum(r.assignments)]
    experts = max((len(r.assignments) for r in routers), default=0)
    overall = [_relative(np.array(r.assignments), experts) for r in routers]
    frames = [Frame(label="all steps", z=overall)]
    if isinstance(summary, TraceSummary):
        frames += _step_frames(summary.samples, routers, experts)
    highest = max([2.0, *(value for row in overall for value in row if value is not None)])
    data = heat_map_trace(
        overall, [r.info.site for r in routers], low=0.0, centre=1.0, high=highest, unit="× equal"
    )
    return Figure(
        key="experts",
        title="Load of each expert",
        caption="Assignments of each expert over an equal share of its layer: 1× (pale) is even, more is "
        "orange, less is blue, 0 is unused.",
        data=[data] if routers else [],
        layout={
            "xaxis": {"title": {"text": "expert"}},
            "yaxis": {"autorange": "reversed", "type": "category"},
            "height": 140 + 24 * len(routers),
        },
        frames=frames if len(frames) > 2 else [],
        headings=("layer", "tokens", "max÷mean", "CV", "Gini", "entropy", "busiest expert", "dead experts"),
        rows=[_load_row(r) for r in routers],
    )


# Blue below, orange above the centre: told apart with any kind of colour vision. A page may put other colours
# in place of these five for its dark theme.
DIVERGING = ("#2166AC", "#92C5DE", "#F5F5F5", "#FDB863", "#B35806")


def heat_map_trace(
    z: list[list[float | None]], sites: Sequence[str], *, low: float, centre: float, high: float, unit: str
) -> Spec:
    """Layers x experts on a diverging scale: both arms use all of their colours, however uneven they are."""
    middle = (centre - low) / (high - low)
    places = (0.0, middle / 2, middle, (1 + middle) / 2, 1.0)
    return {
        "type": "heatmap",
        "z": z,
        "x": list(range(max(map(len, z), default=0))),
        "y": [safe(site) for site in sites],
        "colorscale": [[round(place, 6), colour] for place, colour in zip(places, DIVERGING, strict=True)],
        "zmin": low,
        "zmax": high,
        "colorbar": {"title": {"text": unit}, "thickness": 14},
        "hovertemplate": "layer %{y}, expert %{x}: %{z:.2f}× equal share<extra></extra>",
    }


def _load_row(router: RouterSummary) -> tuple[Cell, ...]:
    load = router.load
    busiest = max(range(len(router.assignments)), key=router.assignments.__getitem__)
    return (
        router.info.site,
        router.tokens,
        load.max_over_mean,
        load.cv,
        load.gini,
        load.entropy,
        busiest,
        len(load.dead_experts),
    )


def _relative(counts: np.ndarray, experts: int) -> list[float | None]:
    total = int(counts.sum())
    row: list[float | None] = [None] * experts
    if total:
        row[: len(counts)] = [round(float(c) * len(counts) / total, 4) for c in counts]
    return row


def _step_frames(
    samples: Sequence[RoutingSample], routers: Sequence[RouterSummary], experts: int
) -> list[Frame]:
    steps = sorted({s.step for s in samples})
    groups = np.array_split(np.array(steps), min(len(steps), STEPS_MAX)) if steps else []
    group_of = {int(step): i for i, group in enumerate(groups) for step in group}
    row_of = {router.info.name: i for i, router in enumerate(routers)}
    counts = np.zeros((len(groups), len(routers), experts), dtype=np.int64)
    for sample in samples:
        row = row_of.get(sample.name)
        if row is not None and sample.phase == "forward":
            counts[group_of[sample.step], row, : len(sample.assignments)] += sample.assignments
    sizes = [len(router.assignments) for router in routers]
    return [
        Frame(
            label=_step_label(group),
            z=[
                [*_relative(row[:size], size), *[None] * (experts - size)]
                for row, size in zip(counts[i], sizes, strict=True)
            ],
        )
        for i, group in enumerate(groups)
    ]


def _step_label(group: np.ndarray) -> str:
    first, last = int(group[0]), int(group[-1])
    return f"step {first}" if first == last else f"steps {first} to {last}"


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
                "line": {"width": 1.5, "color": _layer_colour(i, len(calls))},
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


def _layer_colour(index: int, count: int) -> str:
    """From blue over green to orange along the depth of the model, all readable on light and dark."""
    hue = 220 - 190 * index / max(1, count - 1)
    return f"hsl({hue:.0f}, 65%, 50%)"


# -- time ---------------------------------------------------------------------------------------------


def latency(summary: TraceSummary) -> Figure:
    """Router latency per layer."""
    routers = [r for r in summary.routers if r.latency.host is not None]
    sites = [safe(r.info.site) for r in routers]
    clocks = (
        ("host", "host", "#0072B2"),
        ("device span", "device_span", "#E69F00"),
        ("device busy", "device_busy", "#009E73"),
    )
    data, columns = [], []
    for title, name, colour in clocks:
        found = [getattr(r.latency, name) for r in routers]
        if any(d is not None for d in found):
            p50 = [d.p50 if d is not None else None for d in found]
            reach = [d.p95 - d.p50 if d is not None else 0 for d in found]
            columns.append((title, [(d.p50, d.p95) if d is not None else (None, None) for d in found]))
            data.append(
                {
                    "type": "bar",
                    "name": f"{title}, p50 (to p95)",
                    "x": sites,
                    "y": p50,
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": reach,
                        "arrayminus": [0] * len(reach),
                        "thickness": 1,
                        "color": "#888888",
                    },
                    "marker": {"color": colour},
                }
            )
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
            "xaxis": {"type": "category"},
            "yaxis": {"title": {"text": "µs"}, "rangemode": "tozero"},
            "height": 360,
        },
        headings=("layer", "calls", *headings),
        rows=rows,
    )


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
            "xaxis": {"type": "category"},
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
        found[phase] = us / layer.calls
    if not backward:
        gap = layer.device_gap_us if layer.device_gap_us is not None else layer.host_gap_us
        found["gap"] = gap / layer.calls
    return found


# -- k ------------------------------------------------------------------------------------------------


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
                    "marker": {"color": _layer_colour(i, len(summary.routers))},
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
