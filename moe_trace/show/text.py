"""A summary as text that reads at 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from moe_trace.data.summary import Distribution, RouterSummary, Summary
from moe_trace.data.tables import fixed, number, printable, scaled, table, wrapped
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.text_phases import imbalance_lines, phase_parts, speed_part
from moe_trace.show.text_ranks import rank_parts

_FINDINGS_A_RULE = 3


def render_text(summary: Summary) -> str:
    """The figures of each layer, what they add up to, and what to know before trusting them."""
    parts = [_heading(summary), _load_table(summary.routers), _router_table(summary.routers)]
    if isinstance(summary, TraceSummary):
        parts += [*phase_parts(summary), *speed_part(summary), *imbalance_lines(summary)]
        parts += [*rank_parts(summary), *_findings(summary)]
    if summary.notes:
        parts.append("Notes\n" + "\n".join(wrapped(printable(note, 2000)) for note in summary.notes))
    return "\n\n".join(parts) + "\n"


def _findings(summary: TraceSummary) -> list[str]:
    if not summary.findings:
        return []
    lines, shown = [], Counter[str]()
    for finding in summary.findings:
        shown[finding.rule] += 1
        if shown[finding.rule] <= _FINDINGS_A_RULE:
            lines.append(wrapped(printable(f"{finding.sentence} {finding.advice}", 2000)))
    hidden = sum(max(0, count - _FINDINGS_A_RULE) for count in shown.values())
    if hidden:
        lines.append(wrapped(f"… and {hidden} more of these kinds; --format json has them all."))
    return ["Findings\n" + "\n".join(lines)]


def _heading(summary: Summary) -> str:
    model, totals = summary.model, summary.totals
    name = printable(model.get("name") or model.get("class") or "unnamed model")
    facts = [
        f"{totals.routers} routers",
        f"{totals.calls} calls",
        f"{totals.steps} {'step' if totals.steps == 1 else 'steps'}",
        f"{totals.tokens:,} routed tokens",
        f"{totals.assignments:,} assignments",
    ]
    if totals.skipped:
        facts.append(f"{totals.skipped:,} skipped slots")
    if totals.padding_assignments:
        facts.append(f"{totals.padding_assignments:,} of padding")
    lines = [name, textwrap.fill(", ".join(facts), 80)]
    if summary.trace is not None:
        lines.insert(0, printable(summary.trace, 200))
    return "\n".join(lines)


def _load_table(routers: Sequence[RouterSummary]) -> str:
    rows = [
        [
            label(router),
            f"{router.calls:,}",
            f"{router.tokens:,}",
            fixed(router.load.max_over_mean, 3),
            fixed(router.load.cv, 3),
            fixed(router.load.gini, 3),
            fixed(router.load.entropy, 3),
            str(router.load.active_experts),
            str(len(router.load.dead_experts)),
        ]
        for router in routers
    ]
    headings = ("layer", "calls", "tokens", "max÷mean", "CV", "Gini", "entropy", "active", "dead")
    return "Load of the experts (entropy: of their shares, 1 is even)\n" + table(headings, rows)


def _router_table(routers: Sequence[RouterSummary]) -> str:
    on_device = any(router.latency.device_span is not None for router in routers)
    headings = ["layer", "entropy", "confid.", "p50", "p95"]
    if on_device:
        headings += ["span", "busy"]
    headings += ["router", "experts"]
    rows = []
    for router in routers:
        latency = router.latency
        row = [
            label(router),
            fixed(router.decisions.entropy_mean, 3),
            fixed(router.decisions.confidence_mean, 3),
            number(_figure(latency.host, "p50")),
            number(_figure(latency.host, "p95")),
        ]
        if on_device:
            row += [number(_figure(latency.device_span, "p50")), number(_figure(latency.device_busy, "p50"))]
        row += [scaled(router.flops.router), scaled(router.flops.experts)]
        rows.append(row)
    clocks = "host p50, p95, device span, busy" if on_device else "host p50, p95"
    return f"Routers (entropy in nats; µs a call: {clocks}; FLOP)\n" + table(headings, rows)


def label(router: RouterSummary) -> str:
    """The router's label, cut to a column."""
    return printable(router.info.site, 12)


def _figure(distribution: Distribution | None, name: str) -> float | None:
    return None if distribution is None else float(getattr(distribution, name))
