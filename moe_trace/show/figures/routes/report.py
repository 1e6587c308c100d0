"""All figures of one group of layers of files of routes."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.cache import simulate
from moe_trace.read.routes.study import study
from moe_trace.show.figures.figure import Figure
from moe_trace.show.figures.routes.cache import cache_curve
from moe_trace.show.figures.routes.curves import study_figures

CACHE_STEPS_MAX = 2048
"""Tokens, one after the other as if each were decoded alone."""
CACHED = 8
"""Sizes of memory that the limit is drawn for."""


def routes_figures(parts: Sequence[RecordedRoutes], labels: Sequence[str]) -> list[Figure]:
    """Of a study of the files together, and of a cache on the last one.

    Args:
        parts: one group of layers of each file.

    Raises:
        UsageError: files of other layers.
    """
    found = study_figures(study(parts, labels))
    experts = max(parts[-1].num_experts, default=0)
    sizes = sorted({max(1, experts * eighth // CACHED) for eighth in range(1, CACHED)})
    if experts:
        cached = simulate(parts[-1], sizes, together="token", most_steps=CACHE_STEPS_MAX)
        found += [figure for figure in [cache_curve(cached)] if figure.data]
    return found
