"""One step on a time axis to scale: a band per layer, a line per part within it, counters below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.schema import Span
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.read.time.step_timeline import Clock, Lanes, Segments, counter_tracks
from moe_trace.show.figures.call_grid import sites_of
from moe_trace.show.figures.figure import PHASE_COLOURS, Figure, Spec, curve, safe

BAND_PX, BAND_MIN_PX, LANES_MAX_PX, COUNTER_PX = 34, 12, 900, 84
COUNTER_COLOUR = "#7A5195"


def timeline_figure(
    lanes: Lanes, segments: Segments, *, step: int, clock: Clock, origin_ns: int, window_ns: tuple[int, int]
) -> Figure:
    """Plot lanes and counters of one step, in µs since `origin_ns`, initially showing `window_ns`."""
    calls = lanes.samples.take(np.unique(segments.block))
    sites = sites_of(calls)
    used = np.unique(segments.phase).tolist()
    data = [
        *(_phase_bars(lanes.samples, segments, phase, used, sites, origin_ns) for phase in used),
        *(
            _counter(name, points, origin_ns, f"y{i + 2}")
            for i, (name, points) in enumerate(counter_tracks(calls, clock, window_ns))
        ),
    ]
    apart_us = segments.joined_ns / 1000
    gap_text = f"{apart_us:,.0f}" if apart_us >= 10 else f"{apart_us:.2g}"
    compiled = f" Inside compiled code {BY_COMPILER}." if calls.in_graph.any() else ""
    joined = f" Pieces closer than {gap_text} µs are drawn as one: zoom in to part them."
    return Figure(
        key="timeline",
        title=f"Step {step}, {clock} time",
        caption=f"A band per layer and in it a line per part, by {_unit(clock)}s. Drag to move, scroll or "
        f"pinch to zoom." + (joined if segments.joined_ns else "") + compiled,
        data=data if used else [],
        layout=_layout(sites, data, origin_ns, window_ns),
        headings=("layer", "part", "stretches", f"{_unit(clock)}s", "first starts µs", "last ends µs"),
        rows=_rows(lanes.samples, segments, sites, origin_ns),
    )


def _unit(clock: Clock) -> str:
    return "kernel" if clock == "device" else "operator"


def _phase_bars(
    calls: CallTable,
    segments: Segments,
    phase: int,
    used: Sequence[int],
    sites: Sequence[str],
    origin_ns: int,
) -> Spec:
    rows = np.flatnonzero(segments.phase == phase)
    height = 0.8 / len(used)
    offset = -0.4 + height * (used.index(phase) + 0.5)
    row_of = {site: i for i, site in enumerate(sites)}
    block = segments.block[rows]
    site, call, tokens = (column[block].tolist() for column in (calls.site, calls.call, calls.tokens))
    return {
        "type": "bar",
        "orientation": "h",
        "name": PHASES[phase],
        "base": _us(segments.start_ns[rows] - origin_ns),
        "x": _us(segments.end_ns[rows] - segments.start_ns[rows]),
        "y": [round(row_of[label] + offset, 4) for label in site],
        "width": round(height * 0.92, 4),
        "customdata": list(zip(map(safe, site), call, tokens, segments.pieces[rows].tolist(), strict=True)),
        "marker": {"color": PHASE_COLOURS[PHASES[phase]], "line": {"width": 0}},
        "hovertemplate": f"%{{customdata[0]}} {PHASES[phase]}, call %{{customdata[1]}}: %{{x:.2f}} µs from "
        "%{base:.2f} µs<br>%{customdata[2]} tokens, %{customdata[3]} pieces<extra></extra>",
    }


def _us(time_ns: np.ndarray) -> list[float]:
    return [ns / 1000 for ns in time_ns.tolist()]


def _counter(name: str, points: Sequence[tuple[Span, float]], origin_ns: int, axis: str) -> Spec:
    """Return a step function with the layer's value from the start of its MoE block and 0 from its end."""
    times, values = [], []
    for span, value in points:
        times += [span.start_us - origin_ns / 1000, span.end_us - origin_ns / 1000]
        values += [round(value, 4), 0]
    return curve(
        name,
        [round(time, 3) for time in times],
        values,
        f"{name}: %{{y:.3~f}}",
        yaxis=axis,
        line={"shape": "hv", "width": 1.2, "color": COUNTER_COLOUR},
        fill="tozeroy",
        showlegend=False,
    )


def _layout(sites: Sequence[str], data: Sequence[Spec], origin_ns: int, window_ns: tuple[int, int]) -> Spec:
    counters = [spec for spec in data if spec["type"] == "scatter"]
    band_px = max(BAND_MIN_PX, min(BAND_PX, LANES_MAX_PX // max(1, len(sites))))
    lanes_px = max(120, band_px * len(sites))
    inner_px = lanes_px + COUNTER_PX * len(counters)
    top = COUNTER_PX * len(counters) / inner_px
    tick_step = max(1, -(-len(sites) // 40))
    layout: Spec = {
        "barmode": "overlay",
        "dragmode": "pan",
        "height": inner_px + 110,
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
        "xaxis": {
            "title": {"text": "µs since the step's first MoE work", "standoff": 8},
            "range": [(t - origin_ns) / 1000 for t in window_ns],
            "exponentformat": "none",
            "anchor": f"y{len(counters) + 1}" if counters else "y",
        },
        "yaxis": {
            "domain": [round(min(0.95, top + 14 / inner_px), 4), 1],
            "range": [len(sites) - 0.5, -0.5],
            "fixedrange": True,
            "tickvals": list(range(0, len(sites), tick_step)),
            "ticktext": [safe(site) for site in sites[::tick_step]],
        },
    }
    _add_counter_axes(layout, counters, top)
    return layout


def _add_counter_axes(layout: Spec, counters: Sequence[Spec], top: float) -> None:
    """Add an axis and a title for each counter, stacked in the lower `top` of the figure."""
    for i, spec in enumerate(counters):
        high, height = top * (1 - i / len(counters)), top / len(counters)
        layout[f"yaxis{i + 2}"] = {
            "domain": [round(high - height * 0.72, 4), round(high - height * 0.14, 4)],
            "fixedrange": True,
            "nticks": 3,
            "rangemode": "tozero",
        }
        title = {"text": spec["name"], "showarrow": False, "font": {"size": 12}}
        place = {"x": 0, "xref": "paper", "xanchor": "left", "yref": "paper", "yanchor": "bottom"}
        layout.setdefault("annotations", []).append({**title, **place, "y": round(high - height * 0.13, 4)})


def _rows(
    calls: CallTable, segments: Segments, sites: Sequence[str], origin_ns: int
) -> list[tuple[str | int | float, ...]]:
    site_of = calls.site[segments.block]
    rows: list[tuple[str | int | float, ...]] = []
    for site in sites:
        for phase, name in enumerate(PHASES):
            pieces = np.flatnonzero((site_of == site) & (segments.phase == phase))
            if len(pieces):
                first = float(segments.start_ns[pieces].min() - origin_ns) / 1000
                last = float(segments.end_ns[pieces].max() - origin_ns) / 1000
                rows.append((site, name, len(pieces), int(segments.pieces[pieces].sum()), first, last))
    return rows
