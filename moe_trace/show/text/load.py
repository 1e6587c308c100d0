"""Load balance of experts and confidence of routers as text."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.display.columns import Cell, Column, count_column, text_table
from moe_trace.data.display.tables import fixed, paragraph, printable, scaled
from moe_trace.data.load_stats import ENOUGH_PER_EXPERT, SIGNIFICANT, TOKENS_ALIKE, most_uneven
from moe_trace.data.summary import Distribution, RouterSummary, Summary
from moe_trace.read.analysis import TraceSummary

_MAX_NAMED = 4
_ALIKE = f"{TOKENS_ALIKE} tokens of a text count as one"


def load_parts(summary: Summary) -> list[str]:
    """Render the table of loads, its comparison with chance, and the table of routers."""
    parts = [_load_table(summary.routers)]
    sentences = [*_possible(summary.routers), *_chance(summary.routers)]
    if sentences:
        parts.append(paragraph(" ".join(sentences)))
    report = summary.phases if isinstance(summary, TraceSummary) else None
    compiled = report is not None and report.provenance is not None
    return [*parts, _router_table(summary.routers, f", inside compiled code {BY_COMPILER}" * compiled)]


def _load_table(routers: Sequence[RouterSummary]) -> str:
    tokens = Column("tokens", terminal=lambda n: f"{n:,}" if n < 10_000_000 else scaled(n))
    headings = ("layer", "calls", tokens, "max÷mean", "CV", "chance", "Gini", "entropy", "active", "dead")
    rows = [
        (
            label(router, 10),
            *(router.calls, router.tokens, load.max_over_mean, load.cv),
            None if router.chance.says_nothing else router.chance.cv_clustered,
            *(load.gini, load.entropy, load.active_experts),
            len(load.dead_experts) if router.chance.tells_dead else None,
        )
        for router in routers
        for load in (router.load,)
    ]
    title = (
        f"Load of the experts, forward calls (chance: CV of uniform routing, if {_ALIKE}; entropy: load "
        "entropy, 1 is even"
    )
    if any(router.chance.says_nothing for router in routers):
        title += f"; chance: - below {2 * TOKENS_ALIKE} tokens, which say nothing"
    if not all(router.chance.tells_dead for router in routers):
        title += f"; dead: - below {ENOUGH_PER_EXPERT} assignments an expert"
    return text_table(headings, rows, title=f"{title})")


def _possible(routers: Sequence[RouterSummary]) -> list[str]:
    bounds = {
        (r.chance.floor, r.chance.ceiling)
        for r in routers
        if r.chance.floor is not None and r.chance.ceiling is not None
    }
    if len(bounds) != 1:
        return []
    ((floor, ceiling),) = bounds
    same = abs(floor - ceiling) < 1e-9
    if same:
        return [f"Load max÷mean can only be {floor:.3f} with so few tokens."]
    return [f"Load max÷mean can be {floor:.3f} to {ceiling:.3f}, whatever the routing."]


def _chance(routers: Sequence[RouterSummary]) -> list[str]:
    """Say which loads are more uneven than chance, and which layer is the most uneven."""
    known = [router for router in routers if router.calls]
    if not known:
        return []
    if all(router.chance.says_nothing for router in known):
        return [
            f"So few tokens say nothing about balance: neighbours choose alike, so {TOKENS_ALIKE} of a text "
            "count as one."
        ]
    significant = [router for router in known if router.chance.is_real]
    tokens = {router.tokens for router in known}
    tokens_text = f"{tokens.pop():,} tokens" if len(tokens) == 1 else "as many tokens"
    if not significant:
        return [
            f"No layer is more uneven than uniform routing of {tokens_text} (p ≥ {SIGNIFICANT}; {_ALIKE})."
        ]
    worst = [routers[i] for i in most_uneven([router.chance for router in routers])]
    labels = ", ".join(label(router) for router in worst[:_MAX_NAMED]) + (
        ", …" if len(worst) > _MAX_NAMED else ""
    )
    tie_note = f"{len(worst)} tied, " if len(worst) > 1 else ""
    layers = f"{len(significant)} of {len(known)} layers are" if len(known) > 1 else "The layer is"
    worst_cv, by_chance = fixed(worst[0].load.cv, 3), fixed(worst[0].chance.cv_clustered, 3)
    return [
        f"{layers} more uneven than uniform routing of {tokens_text} (p < {SIGNIFICANT}; {_ALIKE}).",
        f"Most uneven: {labels} ({tie_note}CV {worst_cv}, by chance {by_chance}).",
    ]


def _router_table(routers: Sequence[RouterSummary], mark: str) -> str:
    times = {
        "p50": [_figure(r.latency.host, "p50") for r in routers],
        "p95": [_figure(r.latency.host, "p95") for r in routers],
        "span": [_figure(r.latency.device_span, "p50") for r in routers],
        "busy": [_figure(r.latency.device_busy, "p50") for r in routers],
    }
    known = {name: values for name, values in times.items() if any(value is not None for value in values)}
    rows: list[tuple[Cell, ...]] = [
        (
            *(label(router), router.decisions.entropy_mean, router.decisions.confidence_mean),
            *(values[i] for values in known.values()),
            *(router.flops.router, router.flops.experts),
        )
        for i, router in enumerate(routers)
    ]
    work = (count_column("router"), count_column("experts"))
    headings: list[str | Column] = ["layer", "entropy", "confidence", *known, *work]
    has_recompute = any(router.recomputed_calls for router in routers)
    counted = "FLOP of all forward and recomputed calls" if has_recompute else "FLOP of all calls"
    device = [name for name in known if name in ("span", "busy")]
    clocks = ["host p50 and p95"] * ("p50" in known) + [f"device {' and '.join(device)} p50"] * bool(device)
    latencies = f"µs a forward call{mark}: {', '.join(clocks)}; " if clocks else ""
    title = f"Routers (router entropy in nats; {latencies}{counted})"
    return text_table(headings, rows, title=title)


def label(router: RouterSummary, width: int = 12) -> str:
    """Return the router's label, cut to the width of its column."""
    return printable(router.info.site, width)


def _figure(distribution: Distribution | None, name: str) -> float | None:
    return None if distribution is None else float(getattr(distribution, name))
