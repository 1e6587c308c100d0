"""The figure of a simulated cache: how often an expert is at hand, by how many of them fit in memory."""

from __future__ import annotations

import numpy as np

from moe_trace.read.routes.cache import CacheStudy
from moe_trace.show.figures.figure import LINES, Figure, Spec, axis
from moe_trace.show.figures.routes.curves import dashed, line, percent_axis
from moe_trace.show.figures.routes.matrices import known

_NAMES = {"lru": "LRU", "lfu": "LFU", "static": "static", "belady": "Belady"}
_HEIGHT = 340


def cache_curve(found: CacheStudy) -> Figure:
    """Hit rate of each policy over the experts that fit, with Belady's as the limit."""
    data: list[Spec] = []
    for (policy, rate_E), colour in zip(found.curves.items(), LINES, strict=False):
        sizes = list(range(1, len(rate_E) + 1))
        data.append(line(_NAMES[policy], sizes, rate_E, colour, "%{x} in memory: %{y:.1%} hits"))
    sizes = sorted({result.experts_in_memory for result in found.results})
    best = {r.experts_in_memory: r.hit_rate for r in found.results if r.policy == "belady"}
    if best:
        limit = dashed(
            "Belady, the limit", {"x": sorted(best), "y": [known(best[size]) for size in sorted(best)]}
        )
        data.append({**limit, "mode": "lines+markers", "hoverinfo": "x+y"})
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
            **percent_axis("hit rate", top=1.02),
        },
        headings=("policy", *(f"{size} in memory" for size in sizes)),
        rows=[
            (_NAMES[policy], *(known(rates.get(size, np.nan)) for size in sizes))
            for policy, rates in _rates(found).items()
        ],
    )


def _rates(found: CacheStudy) -> dict[str, dict[int, float]]:
    """Policy -> experts in memory -> hit rate."""
    rates: dict[str, dict[int, float]] = {}
    for result in found.results:
        rates.setdefault(result.policy, {})[result.experts_in_memory] = result.hit_rate
    return rates
