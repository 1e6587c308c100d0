"""Figures of routes as bars and curves: domains, saturation, reuse, and how many experts a batch reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.read.routes.distinct import Distinct
from moe_trace.read.routes.study import LayerStudy, RoutesStudy
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

DOMAINS_MAX = 6
"""Bars side by side."""
_HEIGHT = 320
_COLOURS = tuple(
    PHASE_COLOURS[part] for part in ("router", "dispatch", "experts", "combine", "shared", "other")
)


def study_figures(found: RoutesStudy) -> list[Figure]:
    """All figures that the study has data for."""
    drawn = [
        domain_bars(found),
        saturation_curve(found),
        coactivation_map(found),
        transition_map(found),
        reuse_bars(found),
        distinct_curve(found),
    ]
    return [figure for figure in drawn if figure.data]


def domain_bars(found: RoutesStudy) -> Figure:
    """For each expert the share of each domain's tokens that have it in their top k."""
    layers = [layer for layer in found.layers if layer.domains is not None]
    labels = found.labels[:DOMAINS_MAX]
    sites = dict(zip((layer.layer for layer in found.layers), site_labels(found), strict=True))
    frames = []
    for layer in layers:
        assert layer.domains is not None
        x, uniform = [f"e{e}" for e in range(layer.num_experts)], round(layer.domains.uniform, 5)
        shares = [
            {"x": x, "y": [known(v) for v in row]} for row in layer.domains.share[: len(labels)].tolist()
        ]
        even = {"x": x, "y": [uniform] * len(x)}
        frames.append(Frame(label=sites[layer.layer], traces=[*shares, even]))
    data: list[Spec] = []
    if frames:
        hover = "%{x}: %{y:.1%} of the tokens of %{fullData.name}<extra></extra>"
        data = [
            bars(safe(label), trace["x"], trace["y"], colour, hover)
            for label, colour, trace in zip(labels, _COLOURS, frames[0].traces[:-1], strict=False)
        ]
        data.append(dashed("k / E", frames[0].traces[-1]))
    more = len(found.labels) - len(labels)
    return Figure(
        key="domains",
        title="Domains",
        caption="For each expert, the share of each domain's tokens that have it in their top k; the dashed "
        "line, k / E, is what uniform routing gives."
        + (f" {more} more domains are not drawn." if more > 0 else ""),
        data=data,
        layout={
            **bars_layout("share of tokens", _HEIGHT),
            "barmode": "group",
            **percent_axis("share of tokens"),
        },
        headings=("layer", "domain", "tokens", "its first expert", "share of tokens", "× k/E"),
        rows=[row for layer in layers for row in _domain_rows(sites[layer.layer], layer, found.labels)],
        frames=frames if len(frames) > 1 else [],
        slider="Layer",
    )


def _domain_rows(
    site: str, layer: LayerStudy, labels: Sequence[str]
) -> list[tuple[str, str, int, int | None, float | None, float | None]]:
    assert layer.domains is not None
    rows: list[tuple[str, str, int, int | None, float | None, float | None]] = []
    for label, tokens, share_E in zip(labels, layer.domains.tokens, layer.domains.share, strict=True):
        if not tokens:
            rows.append((site, label, 0, None, None, None))
            continue
        first = int(share_E.argmax())
        share = float(share_E[first])
        rows.append((site, label, int(tokens), first, share, share / layer.domains.uniform))
    return rows


def saturation_curve(found: RoutesStudy) -> Figure:
    """How much of the last checkpoint's top k each checkpoint has."""
    figure = found.saturation
    shown = _spread(len(found.layers), len(LINES))
    sites = site_labels(found)
    data: list[Spec] = []
    if figure is not None:
        x = [safe(label) for label in figure.labels]
        data = [
            line(sites[i], x, figure.top_k[:, i], colour, "%{x}: %{y:.1%} of the last one's experts")
            for i, colour in zip(shown, LINES, strict=False)
        ]
        data.append(dashed("k / E", {"x": x, "y": [known(figure.uniform[shown].mean())] * len(x)}))
    return Figure(
        key="saturation",
        title="Router saturation",
        caption="Share of the experts in the last file's top k that each file chose, too, for the same "
        "tokens; the dashed line is what uniform routing gives."
        + (" Drawn are some of the layers; the table has all." if len(shown) < len(found.layers) else ""),
        data=data,
        layout={"height": _HEIGHT, "xaxis": {"type": "category"}, **percent_axis("shared experts", top=1.02)},
        headings=("layer", *(figure.labels if figure is not None else ())),
        rows=[
            (site, *(known(v) for v in figure.top_k[:, i].tolist()))
            for i, site in enumerate(sites)
            if figure is not None
        ],
    )


def reuse_bars(found: RoutesStudy) -> Figure:
    """Share of a token's experts that the token before it used, by layer."""
    pairs = [
        (site, layer.locality)
        for site, layer in zip(site_labels(found), found.layers, strict=True)
        if layer.locality is not None and len(layer.locality.lags)
    ]
    sites = [site for site, _ in pairs]
    data: list[Spec] = []
    if pairs:
        hover = "%{x}: %{y:.1%} of a token's experts<extra></extra>"
        reused = [known(local.consecutive) for _, local in pairs]
        data = [
            bars("token before", sites, reused, PHASE_COLOURS["router"], hover),
            dashed("k / E", {"x": sites, "y": [known(local.by_chance) for _, local in pairs]}),
            _marks("chance by load", sites, [known(local.by_load) for _, local in pairs]),
        ]
    return Figure(
        key="reuse",
        title="Experts of the token before",
        caption="Share of a token's experts that the token just before it in its sequence used, too. The "
        "dashed line, k / E, is uniform routing; the marks are what the layer's load gives for tokens that "
        "do not depend on each other.",
        data=data,
        layout={**bars_layout("reused", _HEIGHT), **percent_axis("reused")},
        headings=("layer", "reused", "k / E", "chance by load", "never used before"),
        rows=[
            (site, *map(known, (one.consecutive, one.by_chance, one.by_load, one.first_use)))
            for site, one in pairs
        ],
    )


def distinct_curve(found: RoutesStudy) -> Figure:
    """How many experts' weights a layer reads for a batch of so many tokens."""
    sites, figures = site_labels(found), [layer.distinct for layer in found.layers]
    longest = min((len(one.expected) for one in figures), default=0)
    data: list[Spec] = []
    batches: list[int] = []
    if longest:
        curves_LB = np.array([one.expected[:longest] for one in figures])
        points = np.unique(np.round(np.geomspace(1, longest, 60)).astype(np.int64))
        batches = [b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if b <= longest]
        data = _distinct_lines(points, curves_LB[:, points - 1], figures)
    return Figure(
        key="distinct",
        title="Distinct experts of a batch",
        caption="How many of a layer's experts a batch of so many tokens reads: mean over tokens drawn from "
        "this file; the line is the mean of the layers, the band their extremes. Marks: recorded steps.",
        data=data,
        layout={
            "height": _HEIGHT,
            "xaxis": {"type": "log", "title": {"text": "tokens in a batch"}, "dtick": "D2"},
            "yaxis": axis("experts"),
        },
        headings=("layer", *(f"{b} tokens" if b > 1 else "1 token" for b in batches)),
        rows=[
            (site, *(known(one.expected[b - 1], 2) for b in batches))
            for site, one in zip(sites, figures, strict=True)
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
    for one in figures:
        for batch, experts in zip(one.batch_sizes.tolist(), one.measured.tolist(), strict=True):
            measured.setdefault(batch, []).append(experts)
    if measured:
        sizes = sorted(measured)
        means = [known(float(np.mean(measured[s]))) for s in sizes]
        lines.append(_marks("decode steps", sizes, means, "%{x} tokens: %{y:.1f} experts"))
    return lines


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the layers, the first and the last among them."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []
    )


def line(name: str, x: Sequence[object], y: np.ndarray, colour: str, hover: str) -> Spec:
    """One curve, with a mark on each point where they are few."""
    mode, values = "lines+markers" if len(x) < 20 else "lines", [known(v) for v in y.tolist()]
    return curve(safe(name), x, values, f"{safe(name)}, {hover}", mode=mode, line={"color": colour})


def dashed(name: str, trace: Spec) -> Spec:
    """A line to compare with: chance, or a limit."""
    return curve(name, trace["x"], trace["y"], line=DASHED)


def _marks(name: str, x: Sequence[object], y: Sequence[float | None], hover: str = "%{x}: %{y:.1%}") -> Spec:
    return curve(
        name, x, y, hover, mode="markers", marker={"color": LINES[0], "symbol": "diamond", "size": 8}
    )


def percent_axis(title: str, top: float | None = None) -> Spec:
    """The vertical axis of shares."""
    return {"yaxis": axis(title, tickformat=".0%", **({"range": [0, top]} if top else {}))}
