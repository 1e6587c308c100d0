"""All figures of a summary, in the order of the report."""

from __future__ import annotations

from moe_trace.data.summary import Summary
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.decisions import entropy_over_time, k_histogram, load_over_time
from moe_trace.show.figures.distinct import distinct_figure
from moe_trace.show.figures.expert_heat_map import expert_heat_map, physical_figure
from moe_trace.show.figures.figure import Figure
from moe_trace.show.figures.time import latency, phase_figures


def figures(summary: Summary) -> list[Figure]:
    """Return all figures that the summary has data for."""
    found = [expert_heat_map(summary)]
    if isinstance(summary, TraceSummary):
        found.append(physical_figure(summary.physical))
        found += [load_over_time(summary.calls), entropy_over_time(summary.calls), latency(summary)]
        found += phase_figures(summary.phases) if summary.phases is not None else []
        found.append(distinct_figure(summary.distinct))
    found.append(k_histogram(summary.routers))
    return [figure for figure in found if figure.data]
