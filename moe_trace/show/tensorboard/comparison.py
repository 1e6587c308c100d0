"""B against A: difference map, and every metric with its interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_trace.read.analysis import TraceSummary
from moe_trace.read.diff import compare
from moe_trace.show.figures.routing import difference_map
from moe_trace.show.tensorboard.plain import JsonDict, plain_figure, plain_table


def comparison(
    a: TraceSummary, b: TraceSummary, wanted: str, keep: Callable[[str, Callable[[], Any]], Any]
) -> JsonDict:
    """What the view shows of the layer that is wanted, or of all.

    Args:
        keep: computes what the resampling of a layer gives, or finds it.
    """
    names_b = {router.info.name for router in b.routers}
    sites = ["all", *(r.info.site for r in a.routers if r.info.name in names_b)]
    site = wanted if wanted in sites else "all"
    changes = keep(site, lambda: compare(a, b, only=site).changes)
    rows = [(c.metric, c.a, c.b, c.difference, c.relative, c.low, c.high, c.verdict) for c in changes]
    figure = difference_map(a, b)
    headings = ("metric", "A", "B", "B − A", "relative", "interval from", "interval to", "verdict")
    return {
        "sites": sites,
        "site": site,
        "map": plain_figure(figure) if figure.data else None,
        "table": plain_table(headings, rows),
        "changed": sum(c.verdict == "changed" for c in changes),
        "few_calls": any(c.verdict == "few calls" for c in changes),
        "metrics": len(changes),
        "models": [_model(a), _model(b)],
    }


def _model(summary: TraceSummary) -> str:
    return str(summary.model.get("name") or summary.model.get("class") or "unnamed")[:200]
