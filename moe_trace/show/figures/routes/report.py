"""All figures of one group of layers of route files, and the figure of a simulated cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.cache import CacheStudy, simulate
from moe_trace.read.routes.study import study
from moe_trace.show.figures.figure import LINES, Figure, Spec, axis
from moe_trace.show.figures.routes.curves import dashed, line, shares_axis, study_figures
from moe_trace.show.figures.routes.matrices import known

CACHE_STEPS_MAX = 2048
"""Maximum number of simulated tokens, taken one per step as if each were decoded alone."""
CACHED = 8
"""Belady's limit is drawn for memory sizes of 1/8 to 7/8 of a layer's experts."""


def routes_figures(parts: Sequence[RecordedRoutes], labels: Sequence[str]) -> list[Figure]:
    """Return the figures of a study of the files together, and of a cache simulated on the last one.

    Args:
        parts: one group of layers of each file.

    Raises:
        UsageError: the files have different layers.
    """
    found = study_figures(study(parts, labels))
    experts = max(parts[-1].num_experts, default=0)
    sizes = sorted({max(1, experts * eighth // CACHED) for eighth in range(1, CACHED)})
    if experts:
        cached = simulate(parts[-1], sizes, together="token", most_steps=CACHE_STEPS_MAX)
        found += [figure for figure in [cache_curve(cached)] if figure.data]
    return found


_NAMES = {"lru": "LRU", "lfu": "LFU", "static": "static", "belady": "Belady"}
_HEIGHT = 340


def cache_curve(found: CacheStudy) -> Figure:
    """Plot the hit rate of each policy over the experts that fit, with Belady's as the limit."""
    data: list[Spec] = []
    for (policy, rate_E), colour in zip(found.curves.items(), LINES, strict=False):
        sizes = list(range(1, len(rate_E) + 1))
        data.append(line(_NAMES[policy], sizes, rate_E, colour, "%{x} in memory: %{y:.1%} hits"))
    sizes = sorted({result.experts_in_memory for result in found.results})
    best = {r.experts_in_memory: r.hit_rate for r in found.results if r.policy == "belady"}
    if best:
        limit = dashed("Belady, the limit", sorted(best), [known(best[size]) for size in sorted(best)])
        data.append({**limit, "mode": "lines+markers", "hoverinfo": "x+y"})
    rates_of: dict[str, dict[int, float]] = {}
    for result in found.results:
        rates_of.setdefault(result.policy, {})[result.experts_in_memory] = result.hit_rate
    steps = "token" if found.together == "token" else "forward"
    part = f" Simulated: the first {found.steps:,} of {found.steps_recorded:,} steps."
    return Figure(
        key="cache",
        title="Experts at hand in a cache",
        caption=f"If only so many experts of each layer stayed in memory: the share of those that a {steps} "
        "needs which would be there. Belady knows the future; no policy has more hits."
        + (part if found.steps < found.steps_recorded else ""),
        data=data if found.steps else [],
        layout={
            "height": _HEIGHT,
            "xaxis": axis("experts of a layer in memory"),
            "yaxis": shares_axis("hit rate", top=1.02),
        },
        headings=("policy", *(f"{size} in memory" for size in sizes)),
        rows=[
            (_NAMES[policy], *(known(rates.get(size, np.nan)) for size in sizes))
            for policy, rates in rates_of.items()
        ],
    )
