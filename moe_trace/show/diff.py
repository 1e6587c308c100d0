"""Render a comparison of two recordings as text, CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_trace.data.display.columns import Column, text_table
from moe_trace.data.display.csv import csv_text
from moe_trace.data.display.json import attributes
from moe_trace.data.display.tables import number, paragraph, printable, share, signed_percent
from moe_trace.read.diff import Change, Comparison
from moe_trace.read.diff.routing import ExpertShift, RoutingChange

_LAYERS_SHOWN = 8


def _value(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    if 0 < abs(value) < 0.001:
        return f"{value:.0e}"
    return number(value)


SIDES = tuple(Column(side, terminal=_value) for side in "AB")
"""Columns of values that range from shares to FLOP/s."""


def render_diff_text(comparison: Comparison, *, everything: bool = False) -> str:
    """Render the headline, then set-up, routing and metrics with the evidence for each."""
    parts = [
        f"A  {printable(comparison.a, 200)}\nB  {printable(comparison.b, 200)}",
        paragraph(headline(comparison)),
        _setup_part(comparison),
    ]
    for stage in dict.fromkeys(r.stage for r in comparison.routing):
        parts.append(_routing_part([r for r in comparison.routing if r.stage == stage], stage, everything))
    for stage in dict.fromkeys(c.stage for c in comparison.changes):
        parts += _figure_parts([c for c in comparison.changes if c.stage == stage], stage, everything)
    parts += [paragraph(printable(note, 500)) for note in comparison.notes]
    return "\n\n".join(parts) + "\n"


# -- the answer ---------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> str:
    """Return a sentence such as `Changed: set-up (dtype); routing of 3 of 16 compared layers, …`."""
    changes = []
    if comparison.setup:
        changes.append(f"set-up ({', '.join(printable(c.fact, 40) for c in comparison.setup[:4])})")
    changed = comparison.changed_routing
    if changed:
        most = max(changed, key=lambda r: r.total_variation - r.chance)
        layers = len({r.site for r in comparison.routing})
        changes.append(
            f"routing of {len({r.site for r in changed})} of {layers} compared layers, most in "
            f"{printable(most.site, 20)} "
            f"({share(most.total_variation)} of its assignments moved, {share(most.chance)} by chance)"
        )
    of_all_layers = [c for c in comparison.changed_metrics if c.site == "all"]
    for change in sorted(of_all_layers, key=lambda c: -abs(c.relative or 0))[:3]:
        changes.append(f"{words(change.metric)} {size_of(change)}, {change.stage}")
    single = {c.site for c in comparison.changed_metrics} - {"all"}
    if single and not of_all_layers:
        changes.append(f"metrics of {', '.join(sorted(single)[:4])}")
    if changes:
        return f"Changed: {'; '.join(changes)}."
    undecided = any(c.verdict == "few calls" for c in comparison.changes)
    if undecided:
        return (
            "The set-up is the same, and no layer routes differently beyond chance. Too few steps to tell "
            "more."
        )
    if not comparison.changes:
        return "The set-up is the same."
    return "Unchanged: the same set-up, and no difference in routing or metrics beyond noise."


_METRIC_NAMES = {
    "host": "router on the host",
    "device_span": "router's device span",
    "device_busy": "router's kernels",
    "block": "MoE block",
    "experts_flops": "experts' FLOP/s",
    "load_max_over_mean": "load max÷mean",
    "load_cv": "load CV",
    "load_gini": "load Gini",
    "load_entropy": "load entropy",
    "router_entropy": "router entropy",
    "confidence": "router confidence",
}


def words(metric: str) -> str:
    """Return the name of a metric in words: `experts_p50` gives `experts`, `load_cv` gives `load CV`."""
    if metric in _METRIC_NAMES:
        return _METRIC_NAMES[metric]
    if metric.endswith("_share"):
        return f"{metric.removesuffix('_share')}'s share of the block's work"
    base, _, quantile = metric.rpartition("_")
    return _METRIC_NAMES.get(base, base) + ("" if quantile == "p50" else f" ({quantile})")


def size_of(change: Change) -> str:
    """Return the relative change, or the difference where A is 0."""
    return f"{change.difference:+.3g}" if change.relative is None else signed_percent(change.relative)


# -- sections -----------------------------------------------------------------------------------------


def _setup_part(comparison: Comparison) -> str:
    if not comparison.setup:
        return "Set-up: no difference recorded."
    rows = [(change.fact, change.a, change.b) for change in comparison.setup]
    return "Set-up\n" + text_table(("differs", "A", "B"), rows, left=3)


def _routing_part(routing: Sequence[RoutingChange], stage: str, everything: bool) -> str:
    changed = sorted((r for r in routing if r.changed), key=lambda r: r.chance - r.total_variation)
    listed = list(routing) if everything else changed[:_LAYERS_SHOWN]
    unit = "steps dealt anew" if routing[0].chance_from == "steps" else "tokens drawn, few steps"
    title = (
        f"Routing, {stage} (moved: part of a layer's assignments that went to other experts, "
        f"total variation; chance: what 99 of 100 comparisons of the same thing stay under, {unit})"
    )
    if not listed or all(r.same_counts for r in routing):
        return paragraph(f"Routing, {stage}: {_no_layer(routing)}.")
    headings = ("layer", "moved", "chance", "verdict", "gained", "lost")
    rows = [
        (
            *(r.site, r.total_variation, r.chance, "changed" if r.changed else "chance"),
            *(shifts(r.gained), shifts(r.lost)),
        )
        for r in listed
    ]
    parts = [text_table(headings, rows, title=title)]
    if len(listed) < len(changed):
        parts.append(f"… and {len(changed) - len(listed)} more layers; --all shows them.")
    if routing[0].same_counts and changed:
        parts.append(
            paragraph(
                f"{printable(routing[0].site, 20)} routes every call alike, so both read the same text: what "
                f"differs begins at {printable(next(r.site for r in routing if not r.same_counts), 20)}."
            )
        )
    return "\n".join(parts)


def _no_layer(routing: Sequence[RoutingChange]) -> str:
    if all(r.same_counts for r in routing):
        return "the same counts in every call of every layer"
    most = max(routing, key=lambda r: r.total_variation - r.chance)
    if most.chance >= 1:
        return "cannot tell; of so few tokens, chance alone moves all"
    return (
        f"no layer moved beyond chance; nearest to it is {printable(most.site, 20)} with "
        f"{share(most.total_variation)} of its assignments, where chance alone reaches {share(most.chance)}"
    )


def shifts(experts: Sequence[ExpertShift]) -> str:
    """Return two experts and their shifts in percentage points of the layer, as in `26 +1.2, 5 +0.8`."""
    return ", ".join(f"{s.expert} {100 * (s.share_b - s.share_a):+.1f}" for s in experts[:2]) or "-"


def _figure_parts(changes: Sequence[Change], stage: str, everything: bool) -> list[str]:
    of_all_layers = [c for c in changes if c.site == "all"]
    title = f"Metrics of all layers, {stage} (µs a call; interval: 99 % for all rows together)"
    parts = [f"{paragraph(title)}\n{_table(of_all_layers)}"] if of_all_layers else []
    single = [c for c in changes if c.site != "all" and (everything or c.verdict == "changed")]
    for site in dict.fromkeys(c.site for c in single):
        rows = [c for c in single if c.site == site]
        parts.append(f"{printable(site, 40)}, {stage}\n{_table(rows)}")
    return parts


def _table(changes: Sequence[Change]) -> str:
    rows = [(c.metric, c.a, c.b, c.relative, _interval(c), c.verdict) for c in changes]
    return text_table(("metric", *SIDES, "change", "interval", "verdict"), rows)


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return "-"
    if not change.a:
        return f"{_value(change.low)} to {_value(change.high)}"
    low, high = (100 * value / abs(change.a) for value in (change.low, change.high))
    if max(abs(low), abs(high)) >= 1000:
        return "over ±1000 %"
    return f"{low:+.1f} to {high:+.1f} %"


# -- data ---------------------------------------------------------------------------------------------


_CHANGE_FIELDS = ("site", "metric", "a", "b", "difference", "relative", "low", "high", "verdict", "stage")


def render_diff_csv(comparison: Comparison) -> str:
    """Render one row per layer and metric."""
    return csv_text(
        _CHANGE_FIELDS, (list(attributes(change, *_CHANGE_FIELDS).values()) for change in comparison.changes)
    )


def plain_diff(comparison: Comparison) -> dict[str, Any]:
    """Convert a comparison to dicts and lists for JSON."""
    entries = attributes(comparison, "a", "b", "unchanged", "setup", "routing", "notes")
    return entries | {
        "changes": [{**vars(c), **attributes(c, "difference", "relative")} for c in comparison.changes]
    }
