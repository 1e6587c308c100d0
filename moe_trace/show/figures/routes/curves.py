"""Figures of routes as bars and curves: domains, saturation, reuse, and distinct experts of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.display.columns import Cell
from moe_trace.read.routes.distinct import Distinct
from moe_trace.read.routes.study import RoutesStudy
from moe_trace.show.figures.figure import (
    BAND,
    DASHED,
    LINES,
    PHASE_COLOURS,
    Figure,
    Frame,
    Spec,
    axis,
    bars,
    bars_layout,
    curve,
    safe,
)
from moe_trace.show.figures.routes.matrices import coactivation_map, known, site_labels, transition_map
from moe_trace.show.routes.study import BATCHES

DOMAINS_MAX = 6
"""Maximum number of bars side by side."""
_HEIGHT = 320
_COLOURS = tuple(
    PHASE_COLOURS[part] for part in ("router", "dispatch", "experts", "combine", "shared", "other")
)


def study_figures(found: RoutesStudy) -> list[Figure]:
    """Return all figures that the study has data for."""
    drawn = [
        domain_bars(found),
        saturation_curve(found),
        coactivation_map(found),
        transition_map(found),
        reuse_bars(found),
        distinct_curve(found),
    ]
    return [figure for figure in drawn if figure is not None and figure.data]


def domain_bars(found: RoutesStudy) -> Figure | None:
    """Plot, per expert, the share of each domain's tokens with it in their top k; None for a single file."""
    labels = found.labels[:DOMAINS_MAX]
    frames: list[Frame] = []
    rows: list[tuple[Cell, ...]] = []
    for site, layer in zip(site_labels(found), found.layers, strict=True):
        if layer.domains is None:
            continue
        x, uniform = [f"e{e}" for e in range(layer.num_experts)], layer.domains.uniform
        shares = [numbers(share_E) for share_E in layer.domains.share[: len(labels)]]
        traces = [{"x": x, "y": y} for y in (*shares, [round(uniform, 5)] * len(x))]
        frames.append(Frame(label=site, traces=traces))
        for label, tokens, share_E in zip(
            found.labels, layer.domains.tokens.tolist(), layer.domains.share, strict=True
        ):
            first = int(share_E.argmax()) if tokens else None
            share = float(share_E[first]) if first is not None else None
            rows.append((site, label, tokens, first, share, None if share is None else share / uniform))
    if not frames:
        return None
    hover = "%{x}: %{y:.1%} of the tokens of %{fullData.name}<extra></extra>"
    *domains, uniform_trace = frames[0].traces
    data = [
        bars(safe(label), trace["x"], trace["y"], colour, hover)
        for label, colour, trace in zip(labels, _COLOURS, domains, strict=False)
    ]
    omitted = len(found.labels) - len(labels)
    return Figure(
        key="domains",
        title="Domains",
        caption="For each expert, the share of each domain's tokens that have it in their top k; the dashed "
        "line, k / E, is what uniform routing gives."
        + (f" {omitted} more domains are not drawn." if omitted > 0 else ""),
        data=[*data, dashed("k / E", uniform_trace["x"], uniform_trace["y"])],
        layout=bars_layout("share of tokens", _HEIGHT, barmode="group", yaxis=shares_axis("share of tokens")),
        headings=("layer", "domain", "tokens", "its first expert", "share of tokens", "× k/E"),
        rows=rows,
        frames=frames if len(frames) > 1 else [],
        slider="Layer",
    )


def saturation_curve(found: RoutesStudy) -> Figure | None:
    """Plot the share of the last checkpoint's top k that each checkpoint has; None if the tokens differ."""
    figure = found.saturation
    if figure is None:
        return None
    drawn_layers = _spread_indices(len(found.layers), len(LINES))
    sites, x = site_labels(found), [safe(label) for label in figure.labels]
    data = [
        line(sites[i], x, figure.top_k[:, i], colour, "%{x}: %{y:.1%} of the last one's experts")
        for i, colour in zip(drawn_layers, LINES, strict=False)
    ]
    return Figure(
        key="saturation",
        title="Router saturation",
        caption="Share of the experts in the last file's top k that each file chose, too, for the same "
        "tokens; the dashed line is what uniform routing gives."
        + (
            " Drawn are some of the layers; the table has all."
            if len(drawn_layers) < len(found.layers)
            else ""
        ),
        data=[*data, dashed("k / E", x, [known(figure.uniform[drawn_layers].mean())] * len(x))],
        layout={
            "height": _HEIGHT,
            "xaxis": {"type": "category"},
            "yaxis": shares_axis("shared experts", top=1.02),
        },
        headings=("layer", *figure.labels),
        rows=[(site, *numbers(figure.top_k[:, i])) for i, site in enumerate(sites)],
    )


def reuse_bars(found: RoutesStudy) -> Figure | None:
    """Plot, by layer, the share of a token's experts that the previous token used; None without any."""
    rows = [
        (site, *map(known, (one.consecutive, one.by_chance, one.by_load, one.first_use)))
        for site, layer in zip(site_labels(found), found.layers, strict=True)
        if (one := layer.locality) is not None and len(one.lags)
    ]
    if not rows:
        return None
    sites, reused, by_chance, by_load, _ = zip(*rows, strict=True)
    hover = "%{x}: %{y:.1%} of a token's experts<extra></extra>"
    return Figure(
        key="reuse",
        title="Experts of the token before",
        caption="Share of a token's experts that the token just before it in its sequence used, too. The "
        "dashed line, k / E, is uniform routing; the marks are what the layer's load gives for tokens that "
        "do not depend on each other.",
        data=[
            bars("token before", sites, list(reused), PHASE_COLOURS["router"], hover),
            dashed("k / E", sites, by_chance),
            _marks("chance by load", sites, by_load),
        ],
        layout=bars_layout("reused", _HEIGHT, yaxis=shares_axis("reused")),
        headings=("layer", "reused", "k / E", "chance by load", "never used before"),
        rows=rows,
    )


def distinct_curve(found: RoutesStudy) -> Figure | None:
    """Plot the number of experts whose weights a layer reads, by batch size; None without tokens."""
    sites, figures = site_labels(found), [layer.distinct for layer in found.layers]
    longest = min((len(figure.expected) for figure in figures), default=0)
    if not longest:
        return None
    curves_LB = np.array([figure.expected[:longest] for figure in figures])
    points = np.unique(np.round(np.geomspace(1, longest, 60)).astype(np.int64))
    batches = [batch for batch in BATCHES if batch <= longest]
    return Figure(
        key="distinct",
        title="Distinct experts of a batch",
        caption="How many of a layer's experts a batch of so many tokens reads: mean over tokens drawn from "
        "this file; the line is the mean of the layers, the band their extremes. Marks: recorded steps.",
        data=_distinct_lines(points, curves_LB[:, points - 1], figures),
        layout={
            "height": _HEIGHT,
            "xaxis": {"type": "log", "title": {"text": "tokens in a batch"}, "dtick": "D2"},
            "yaxis": axis("experts"),
        },
        headings=("layer", *(f"{b} tokens" if b > 1 else "1 token" for b in batches)),
        rows=[
            (site, *(known(figure.expected[b - 1], 2) for b in batches))
            for site, figure in zip(sites, figures, strict=True)
        ],
    )


def _distinct_lines(points: np.ndarray, curves_LP: np.ndarray, figures: Sequence[Distinct]) -> list[Spec]:
    x = points.tolist()
    low, high = (np.round(edge, 3).tolist() for edge in (curves_LP.min(axis=0), curves_LP.max(axis=0)))
    mean, extremes = curves_LP.mean(axis=0), "extremes of the layers"
    lines = [
        curve(extremes, x, low, line={"width": 0}, showlegend=False),
        curve(extremes, x, high, line={"width": 0}, fill="tonexty", fillcolor=BAND),
        line("mean of the layers", x, mean, PHASE_COLOURS["router"], "%{x}: %{y:.1f} experts"),
    ]
    measured: dict[int, list[float]] = {}
    for figure in figures:
        for batch, experts in zip(figure.batch_sizes.tolist(), figure.measured.tolist(), strict=True):
            measured.setdefault(batch, []).append(experts)
    if measured:
        sizes = sorted(measured)
        means = [known(float(np.mean(measured[s]))) for s in sizes]
        lines.append(_marks("decode steps", sizes, means, "%{x} tokens: %{y:.1f} experts"))
    return lines


def _spread_indices(count: int, most: int) -> list[int]:
    """Return the indices of at most `most` layers, including the first and the last."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(int)).tolist()


def numbers(values: np.ndarray, digits: int = 4) -> list[float | None]:
    """Return the values for JSON: rounded, None for NaN."""
    return [known(value, digits) for value in values.tolist()]


def line(name: str, x: Sequence[object], y: np.ndarray, colour: str, hover: str) -> Spec:
    """Return a curve, with markers if it has few points."""
    mode = "lines+markers" if len(x) < 20 else "lines"
    return curve(safe(name), x, numbers(y), f"{safe(name)}, {hover}", mode=mode, line={"color": colour})


def dashed(name: str, x: Sequence[object], y: Sequence[float | None]) -> Spec:
    """Return a reference line, such as chance or a limit."""
    return curve(name, x, y, line=DASHED)


def _marks(name: str, x: Sequence[object], y: Sequence[float | None], hover: str = "%{x}: %{y:.1%}") -> Spec:
    marker = {"color": LINES[0], "symbol": "diamond", "size": 8}
    return curve(name, x, y, hover, mode="markers", marker=marker)


def shares_axis(title: str, top: float | None = None) -> Spec:
    """Return the vertical axis of shares."""
    return axis(title, tickformat=".0%", **({"range": [0, top]} if top else {}))
