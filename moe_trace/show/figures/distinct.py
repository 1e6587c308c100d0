"""Figure of the number of experts that a step reads, by its number of tokens."""

from __future__ import annotations

from moe_trace.data.display.columns import Cell
from moe_trace.read.experts.distinct import DistinctExperts, DistinctReport
from moe_trace.show.figures.figure import BAND, DASHED, PHASE_COLOURS, Figure, Spec, axis, curve

HEADINGS = ("tokens", "calls", "fewest", "median", "most", "uniform", "of", "read MB", "least µs")


def distinct_figure(report: DistinctReport | None) -> Figure:
    """Plot median and extremes over all layers' calls against uniform routing; no data without a report."""
    sizes = report.sizes if report is not None else ()
    return Figure(
        key="distinct",
        title="Distinct experts of a forward",
        caption="Experts of a layer that got a token in a forward, by its tokens: these weights are "
        "read. Line: median of all layers' calls; band: extremes; dashed: uniform routing of as many tokens. "
        "Read, and least µs at the device's memory bandwidth: of all layers together.",
        data=_lines(sizes) if sizes else [],
        layout={
            "height": 320,
            "xaxis": {"type": "log", "title": {"text": "tokens in a forward"}, "dtick": "D2"},
            "yaxis": axis("experts"),
        },
        headings=HEADINGS,
        rows=[row(size) for size in sizes],
    )


def row(size: DistinctExperts) -> tuple[Cell, ...]:
    """Return the cells of `HEADINGS`."""
    read = None if size.bytes is None else size.bytes / 1e6
    counts = (size.min, size.median, size.max, size.uniform, size.experts)
    return (size.label, size.calls, *counts, read, size.least_us)


def _lines(sizes: tuple[DistinctExperts, ...]) -> list[Spec]:
    x = [(size.tokens_min * size.tokens_max) ** 0.5 for size in sizes]
    edge: Spec = {"mode": "lines+markers", "line": {"width": 0}, "marker": {"size": 1}}
    named: Spec = {"mode": "lines+markers", "customdata": [size.label for size in sizes]}
    low, high, median = ([getattr(size, name) for size in sizes] for name in ("min", "max", "median"))
    uniform, hover = [round(size.uniform, 3) for size in sizes], "%{customdata} tokens: %{y:.1f} experts"
    return [
        curve("extremes", x, low, **edge, showlegend=False),
        curve("extremes", x, high, **edge, fill="tonexty", fillcolor=BAND),
        curve("median", x, median, hover, **named, line={"color": PHASE_COLOURS["experts"]}),
        curve("uniform routing", x, uniform, f"{hover} by uniform routing", **named, line=DASHED),
    ]
