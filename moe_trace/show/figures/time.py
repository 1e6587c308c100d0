"""Figures of time: phases by both clocks, latency distribution, launch gaps, forward against backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.summary import Distribution
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.time.layers import LayerPhases, Pass, PhaseReport
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.show.figures.distinct import distinct_figure
from moe_trace.show.figures.figure import (
    PHASE_COLOURS,
    Figure,
    Spec,
    axis,
    bars,
    bars_layout,
    curve,
    layer_columns,
)

Clock = Literal["device", "host"]
BINS = 48
HOST, SPAN, BUSY = "#0072B2", "#E69F00", "#009E73"
CLOCKS = {"host": HOST, "device span": SPAN, "device busy": BUSY}
_CALL_NOUNS: dict[Pass, str] = {
    "forward": "call",
    "recompute": "call that gradient checkpointing ran again",
    "backward": "call's backward",
}
_PASS_COLOURS: dict[Pass, str] = {"forward": HOST, "recompute": "#56B4E9", "backward": SPAN}


def time_figures(summary: TraceSummary) -> list[Figure]:
    """Return all figures of time that the trace has data for, with phases once per clock."""
    report = summary.phases
    found = []
    if report is not None:
        found = [*phase_figures(report, every_clock=True), launch_gaps(report)]
        if report.total.backward is not None:
            found.append(passes_side_by_side(report))
    found += [latency(summary), latency_distribution(summary), distinct_figure(summary.distinct)]
    return [figure for figure in found if figure.data]


def phase_figures(report: PhaseReport, *, every_clock: bool = False) -> list[Figure]:
    """Return the phases of forward, recomputed and backward calls, by the device's clock if there is one."""
    clocks = _clocks(report) if every_clock else _clocks(report)[:1]
    return [phase_stack(report, clock, part) for part in report.passes() for clock in clocks]


def _clocks(report: PhaseReport) -> tuple[Clock, ...]:
    """Return the clocks to show: the host's next to the device's only where it is known of all calls."""
    if not report.whole.on_device:
        return ("host",)
    return ("device", "host") if report.whole.host_known else ("device",)


def inside_compiled(report: PhaseReport | None) -> str:
    """Return the note on the source of times inside compiled code, without their coverage."""
    known = report is not None and report.provenance is not None
    return f" Inside compiled code {BY_COMPILER}." if known else ""


def phase_stack(report: PhaseReport, clock: Clock, part: Pass) -> Figure:
    """Plot the mean time of each phase of one call as stacked bars, per layer."""
    of_layers = [(part_us(layer, clock, part), max(1, layer.count(part))) for layer in report.layers]
    columns = {
        name: [us[name] / calls if name in us else None for us, calls in of_layers]
        for name in (*PHASES, "gap")
    }
    columns = {name: values for name, values in columns.items() if any(values)}
    noun = "kernels" if clock == "device" else "operators"
    mark = "" if report.provenance is None else f", inside compiled code {report.provenance}"
    return Figure(
        key=f"{part}-{clock}",
        title=f"Breakdown of an MoE call, {part}, {clock} time",
        caption=f"Mean time in {noun} of one {_CALL_NOUNS[part]}{mark}."
        + ("" if part == "backward" else f" A gap is time of the block in which none of its {noun} ran."),
        data=[
            _bars(report, name, values, PHASE_COLOURS[name], "%{y:.1f}") for name, values in columns.items()
        ],
        layout=bars_layout("µs a call", 340, barmode="stack", legend={"traceorder": "normal"}),
        headings=("layer", "calls", *(f"{name} µs" for name in columns)),
        rows=[
            (layer.site, layer.count(part), *values)
            for layer, *values in zip(report.layers, *columns.values(), strict=True)
        ],
    )


def _bars(
    report: PhaseReport, name: str, values: Sequence[float | None], colour: str, hover: str, digits: int = 3
) -> Spec:
    """Return a bar per layer; a phase that a layer does not have is drawn like one that took no time."""
    heights = [round(value or 0.0, digits) for value in values]
    sites = [layer.site for layer in report.layers]
    return bars(name, sites, heights, colour, f"%{{x}} {name}: {hover}<extra></extra>")


def part_us(layer: LayerPhases, clock: Clock, part: Pass) -> dict[str, float]:
    """Return the time of each phase over a layer's calls, and of `gap` and `block` except in the backward."""
    on_device = clock == "device"
    found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for phase, time in (layer.phases_of(part) or {}).items():
        found[phase] = (time.device_busy_us or 0.0) if on_device else time.host_us
    block = layer.recompute if part == "recompute" else layer
    if part != "backward" and block is not None:
        found["gap"] = (block.device_gap_us or 0.0) if on_device else block.host_gap_us
        found["block"] = (block.device_span_us or 0.0) if on_device else block.block_host_us
    return found


def launch_gaps(report: PhaseReport) -> Figure:
    """Plot the share of each block's time in which none of its work ran, by both clocks."""
    clocks = _clocks(report)
    data: list[Spec] = []
    columns = []
    for clock in clocks:
        times = [part_us(layer, clock, "forward") for layer in report.layers]
        pairs = [(us["gap"], us["block"]) for us in times]
        shares = [gap / whole if whole else 0.0 for gap, whole in pairs]
        mean_us = [gap / max(1, layer.calls) for (gap, _), layer in zip(pairs, report.layers, strict=True)]
        columns.append(list(zip(mean_us, shares, strict=True)))
        colour = BUSY if clock == "device" else HOST
        data.append(_bars(report, clock, shares, colour, "%{y:.1%} of the block", 5))
    return Figure(
        key="gaps",
        title="Launch gaps",
        caption="Share of the block's time in which none of its kernels (device) or operators (host) ran. "
        f"Large device gaps: the host launches more slowly than the device works.{inside_compiled(report)}",
        data=data,
        layout={
            "barmode": "group",
            "xaxis": layer_columns(),
            "yaxis": axis("share of the block", tickformat=".0%"),
            "height": 300,
            "showlegend": len(data) > 1,
        },
        headings=("layer", *(f"{c} gap {unit}" for c in clocks for unit in ("µs", "share"))),
        rows=[
            (layer.site, *(value for column in columns for value in column[i]))
            for i, layer in enumerate(report.layers)
        ],
    )


def passes_side_by_side(report: PhaseReport) -> Figure:
    """Plot the work of each layer's call: forward, recompute under checkpointing, backward."""
    clock = _clocks(report)[0]
    parts = report.passes()
    values = {
        part: [
            sum(us[phase] for phase in PHASES) / max(1, layer.count(part))
            for layer in report.layers
            for us in (part_us(layer, clock, part),)
        ]
        for part in parts
    }
    return Figure(
        key="directions",
        title="Forward against backward",
        caption=f"Mean {'kernel' if clock == 'device' else 'operator'} time of one call. Backward nodes are "
        "found by the profiler's forward-backward links; the backward of matrix products costs twice their "
        "forward."
        + inside_compiled(report)
        + (" Recompute: calls that gradient checkpointing ran again." if "recompute" in parts else ""),
        data=[_bars(report, part, us, _PASS_COLOURS[part], "%{y:.1f} µs") for part, us in values.items()],
        layout=bars_layout("µs a call", 300, barmode="group"),
        headings=("layer", *(f"{part} µs" for part in parts), "backward÷forward"),
        rows=[
            (layer.site, *us, us[-1] / us[0] if us[0] else None)
            for layer, *us in zip(report.layers, *values.values(), strict=True)
        ],
    )


def latency(summary: TraceSummary) -> Figure:
    """Plot router latency per layer."""
    routers = [r for r in summary.routers if r.latency.host is not None]
    sites = [r.info.site for r in routers]
    data, columns = [], []
    for title, colour in CLOCKS.items():
        found = [getattr(r.latency, title.replace(" ", "_")) for r in routers]
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
    """Return bars at the median, with whiskers up to the 95th percentile."""
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


def latency_distribution(summary: TraceSummary) -> Figure:
    """Plot a histogram of router latency over calls, by three clocks."""
    spans_us = summary.calls.duration_us("device", "router")
    clocks = {
        "host": summary.calls.host_us(),
        "device span": spans_us[~np.isnan(spans_us)],
        "device busy": np.array(list(summary.busy_us.values())),
    }
    known = {name: values for name, values in clocks.items() if (values > 0).any()}
    data: list[Spec] = []
    if known:
        everything = np.concatenate([values[values > 0] for values in known.values()])
        low, high = float(everything.min()), float(everything.max())
        edges = np.geomspace(low * 0.999, high * 1.001, BINS + 1)
        data = [_histogram(name, values, CLOCKS[name], edges) for name, values in known.items()]
    return Figure(
        key="latencies",
        title="Router latency, distribution over calls",
        caption="Calls of all layers by their latency; the axis is logarithmic."
        + inside_compiled(summary.phases),
        data=data,
        layout={
            "xaxis": {"type": "log", "title": {"text": "µs"}, **_ticks(data)},
            "yaxis": axis("calls"),
            "height": 300,
            "showlegend": len(data) > 1,
        },
        headings=("clock", "calls", "lowest µs", "p50 µs", "p95 µs", "highest µs"),
        rows=[
            (name, len(v), float(v.min()), *(float(p) for p in np.percentile(v, (50, 95))), float(v.max()))
            for name, v in known.items()
        ],
    )


def _ticks(data: Sequence[Spec]) -> Spec:
    """Return ticks at 1, 2, 5, 10 ..., since plotly's own are hard to read on a short logarithmic axis."""
    edges = [edge for spec in data for edge in (spec["x"][0], spec["x"][-1])]
    if not edges:
        return {}
    values = [m * 10.0**e for e in range(-3, 9) for m in (1, 2, 5)]
    values = [value for value in values if min(edges) <= value <= max(edges)]
    return {"tickvals": values, "ticktext": [f"{value:g}" for value in values]} if len(values) > 1 else {}


def _histogram(name: str, values: np.ndarray, colour: str, edges: np.ndarray) -> Spec:
    counts, _ = np.histogram(values, edges)
    x, hover = [round(float(edge), 4) for edge in edges], f"{name}: %{{y}} calls from %{{x:.1f}} µs"
    return curve(name, x, [*counts.tolist(), 0], hover, line={"shape": "hv", "width": 2, "color": colour})
