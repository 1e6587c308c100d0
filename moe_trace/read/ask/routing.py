"""Answers about how tokens are routed to experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_trace.data.load_stats import SIGNIFICANT, TOKENS_ALIKE, most_uneven
from moe_trace.data.summary import RouterSummary
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.diff.routing import RoutingChange
from moe_trace.read.findings.finding import count, percent

NAMED = 4
EXPERTS_NAMED = 3
_ALIKE = f"{TOKENS_ALIKE} tokens of a text count as one, for neighbours choose alike"


def imbalance(part: TraceSummary) -> dict[str, Any]:
    """Name the layers that are most uneven beyond chance, including all that tie."""
    routers = [router for router in part.routers if router.calls]
    chances = [router.chance for router in routers]
    tokens = max((router.tokens for router in routers), default=0)
    worst = [routers[i] for i in most_uneven(chances)]
    figures: dict[str, Any] = {
        "layers": [router.info.site for router in worst],
        "real_layers": sum(chance.is_real for chance in chances),
        "of_layers": len(routers),
        "tokens": tokens,
    }
    if worst:
        figures |= _figures(worst[0])
        return {"sentence": _most_uneven(worst, figures), "figures": figures}
    if all(chance.says_nothing for chance in chances):
        return {"sentence": _too_few(tokens, "about balance"), "figures": figures}
    nearest = max(routers, key=lambda router: router.load.cv or 0.0)
    figures |= _figures(nearest)
    return {
        "sentence": f"None beyond chance: uniform routing of {tokens:,} tokens is as uneven (p ≥ "
        f"{SIGNIFICANT}; {_ALIKE}). {nearest.info.site} has the largest CV, {figures['cv']:.3f}, and chance "
        f"has {figures['chance_cv_clustered']:.3f}.",
        "figures": figures,
    }


def _too_few(tokens: int, about: str) -> str:
    return (
        f"Cannot tell: {count(tokens, 'token')} a layer say nothing {about}, for neighbours choose alike and "
        f"{TOKENS_ALIKE} of a text count as one. Record more."
    )


def _figures(router: RouterSummary) -> dict[str, Any]:
    load, chance = router.load, router.chance
    return {
        "cv": load.cv,
        "chance_cv": chance.cv,
        "chance_cv_clustered": chance.cv_clustered,
        "cv_beyond": chance.cv_beyond,
        "p_value": chance.p_value,
        "p_value_clustered": chance.p_value_clustered,
        "load_max_over_mean": load.max_over_mean,
        "ceiling": chance.ceiling,
        "active_experts": load.active_experts,
        "experts": router.info.num_experts,
    }


def _most_uneven(worst: Sequence[RouterSummary], figures: dict[str, Any]) -> str:
    sites = ", ".join(router.info.site for router in worst[:NAMED]) + (", …" if len(worst) > NAMED else "")
    tie_note = f" ({len(worst)} layers tie)" if len(worst) > 1 else ""
    busiest = max(range(len(worst[0].assignments)), key=worst[0].assignments.__getitem__)
    every = figures["of_layers"] == figures["real_layers"]
    others = "every layer" if every else f"{figures['real_layers']} of {figures['of_layers']} layers"
    return (
        f"{sites}{tie_note}: CV {figures['cv']:.3f}, where uniform routing of {worst[0].tokens:,} tokens has "
        f"{figures['chance_cv_clustered']:.3f} ({_ALIKE}). It is real (p < {SIGNIFICANT}), as in {others}. "
        f"Expert {busiest} gets {figures['load_max_over_mean']:.2f}× its share (most possible "
        f"{figures['ceiling']:.2f}×); {figures['active_experts']} of {figures['experts']} experts got tokens."
    )


def served(part: TraceSummary) -> dict[str, Any]:
    """Name the busiest experts of each layer on the text of this run."""
    if part.routers and all(router.chance.says_nothing for router in part.routers):
        tokens = max(router.tokens for router in part.routers)
        return {"sentence": _too_few(tokens, "about which experts serve a text")}
    rows = []
    for router in part.routers:
        total = sum(router.assignments)
        order = sorted(range(len(router.assignments)), key=lambda e: -router.assignments[e])
        busiest = [(e, router.assignments[e] / total) for e in order[:EXPERTS_NAMED] if total]
        rows.append({"layer": router.info.site, "busiest": busiest})
    expert_counts = {router.info.num_experts for router in part.routers}
    share = f" An even share is {percent(1 / expert_counts.pop())}." if len(expert_counts) == 1 else ""
    return {
        "sentence": "The busiest experts of this run; give a second run, on other text, to see which experts "
        f"serve which.{share}",
        "rows": tuple(rows),
    }


def served_apart(routing: Sequence[RoutingChange], labels: tuple[str, str]) -> dict[str, Any]:
    """Name the experts of each layer that serve one text more than the other."""
    changed_layers = sorted((r for r in routing if r.changed), key=lambda r: r.chance - r.total_variation)
    figures = {"changed_layers": len(changed_layers), "of_layers": len(routing)}
    if all(change.same_counts for change in routing):
        return {"sentence": "The same: every call has the same counts in both runs.", "figures": figures}
    if not changed_layers:
        near = max(routing, key=lambda r: r.total_variation - r.chance)
        if near.chance >= 1:
            return {"sentence": "Cannot tell: of so few tokens, chance alone moves all.", "figures": figures}
        return {
            "sentence": f"No layer tells the two apart beyond chance; nearest is {near.site}, with "
            f"{percent(near.total_variation)} of its assignments at other experts, where chance alone "
            f"reaches {percent(near.chance)}.",
            "figures": figures,
        }
    most = changed_layers[0]
    return {
        "sentence": f"{len(changed_layers)} of {len(routing)} layers send {labels[0]} and {labels[1]} to "
        f"different experts beyond chance, {most.site} most: {percent(most.total_variation)} of its "
        f"assignments are at other experts, {percent(most.chance)} by chance.",
        "figures": figures,
        "rows": tuple(_row(change, labels) for change in changed_layers),
    }


def _row(change: RoutingChange, labels: tuple[str, str]) -> dict[str, Any]:
    return {
        "layer": change.site,
        "moved": change.total_variation,
        "chance": change.chance,
        labels[0]: [(s.expert, s.share_a, s.share_b) for s in change.lost],
        labels[1]: [(s.expert, s.share_b, s.share_a) for s in change.gained],
    }
