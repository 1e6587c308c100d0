"""B against A: changes of set-up, routing and metrics, and the map of load differences."""

from __future__ import annotations

from moe_trace.data.display.tables import share
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.diff import Comparison
from moe_trace.show.diff import headline, shifts
from moe_trace.show.figures.figure import Figure
from moe_trace.show.tensorboard.to_json import JsonDict, plain_figure, plain_table


def compared_sites(a: TraceSummary, b: TraceSummary) -> list[str]:
    """Return `all`, followed by the layers that both traces have."""
    names_b = {router.info.name for router in b.routers}
    return ["all", *(r.info.site for r in a.routers if r.info.name in names_b)]


def comparison(found: Comparison, difference: Figure) -> JsonDict:
    """Return the data of the view, for the layer that was compared or for all."""
    changes = found.changes
    rows = [(c.metric, c.a, c.b, c.difference, c.relative, c.low, c.high, c.verdict) for c in changes]
    headings = ("metric", "A", "B", "B − A", "relative", "interval from", "interval to", "verdict")
    return {
        "headline": headline(found),
        "setup": plain_table(("what differs", "A", "B"), [(s.fact, s.a, s.b) for s in found.setup]),
        "notes": list(found.notes),
        "map": plain_figure(difference) if difference.data else None,
        "routing": _routing(found),
        "table": plain_table(headings, rows),
        "changed": sum(c.verdict == "changed" for c in changes),
        "metrics": len(changes),
    }


def _routing(found: Comparison) -> JsonDict:
    """Return the layers as a table, those whose shares moved most beyond chance first."""
    rows = [
        (
            change.site,
            share(change.total_variation),
            share(change.chance),
            "changed" if change.changed else "chance",
            shifts(change.gained),
            shifts(change.lost),
        )
        for change in sorted(found.routing, key=lambda c: c.chance - c.total_variation)
    ]
    return plain_table(
        ("layer", "moved to other experts", "by chance", "verdict", "gained (points)", "lost (points)"), rows
    )
