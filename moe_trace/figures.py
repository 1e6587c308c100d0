"""All figures of one summary, in the order of the report."""

from __future__ import annotations

from moe_trace.figure import Figure
from moe_trace.figures_decisions import entropy_over_time, k_histogram, load_over_time
from moe_trace.figures_latency import latency, phase_figures
from moe_trace.figures_load import expert_heat_map
from moe_trace.reading.analysis import TraceSummary
from moe_trace.summary import Summary


def figures(summary: Summary) -> list[Figure]:
    """All figures that the summary has data for."""
    found = [expert_heat_map(summary)]
    if isinstance(summary, TraceSummary):
        found += [load_over_time(summary), entropy_over_time(summary), latency(summary)]
        found += phase_figures(summary.phases) if summary.phases is not None else []
    found.append(k_histogram(summary))
    return [figure for figure in found if figure.data]
