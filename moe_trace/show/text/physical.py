"""Load of the slots of a load balancer as text."""

from __future__ import annotations

from moe_trace.data.display.columns import text_table
from moe_trace.data.display.tables import paragraph, printable
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.expert_heat_map import PHYSICAL_HEADINGS, physical_row

_MAX_NAMED = 3


def physical_part(summary: TraceSummary) -> list[str]:
    """Render a row per layer, and the replicas that share their tokens least evenly."""
    report = summary.physical
    if report is None:
        return []
    title = (
        "Load by physical expert (a slot of the load balancer): max÷mean of logical experts, of slots, of "
        "the ranks that hold them; maps: different placements; replicas: worst "
        "max÷mean within one expert's."
    )
    parts = [text_table(PHYSICAL_HEADINGS, [physical_row(layer) for layer in report.layers], title=title)]
    shared = [
        (replica.max_over_mean, printable(layer.site, 12), replica)
        for layer in report.layers
        for replica in layer.replicas
        if replica.max_over_mean is not None
    ]
    shared.sort(key=lambda row: -row[0])
    if shared:
        descriptions = [
            f"expert {replica.expert} of {site} ({replica.assignments:,} assignments to slots "
            f"{', '.join(map(str, replica.slots))}: the busiest {ratio:.2f}× the mean)"
            for ratio, site, replica in shared[:_MAX_NAMED]
        ]
        parts.append(paragraph(f"Replicas that share least evenly: {'; '.join(descriptions)}."))
    return parts
