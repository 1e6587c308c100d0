"""Figure of what each slot of a load balancer got."""

from __future__ import annotations

import numpy as np

from moe_trace.read.experts.physical import PhysicalLoad, PhysicalReport
from moe_trace.show.figures.expert_heat_map import equal_share_row, heat_map_trace
from moe_trace.show.figures.figure import (
    Cell,
    Figure,
    cap_said,
    colour_cap,
    ids_axis,
    layers_axis,
    rows_px,
    safe,
)

HEADINGS = ("layer", "experts", "slots", "maps", "by expert", "by slot", "by rank", "replicas")


def physical_figure(report: PhysicalReport | None) -> Figure:
    """Layers x slots: each slot's assignments over the mean of its layer; no data where there are none."""
    layers = report.layers if report is not None else ()
    width = max((len(layer.assignments) for layer in layers), default=0)
    z = [equal_share_row(np.array(layer.assignments), width) for layer in layers]
    known = [value for line in z for value in line if value is not None]
    highest = max(2.0, colour_cap(known, least=4.0))
    data = heat_map_trace(
        z, [layer.site for layer in layers], low=0.0, centre=1.0, high=highest, unit="× equal"
    )
    data["hovertemplate"] = "layer %{y}, slot %{x}: %{z:.2f}× equal share<extra>%{text}</extra>"
    data["text"] = [[_held(layer, slot) for slot in range(width)] for layer in layers]
    return Figure(
        key="physical",
        title="Load of each physical expert",
        caption="Assignments of each slot of the load balancer over an equal share of its layer; a slot's "
        "expert may change. In the table max÷mean: by logical expert, by slot, by the rank that holds it, "
        "and the worst among one expert's replicas." + (cap_said(highest, known) if known else ""),
        data=[data] if layers else [],
        layout={
            "xaxis": ids_axis("slot", width),
            "yaxis": layers_axis([safe(layer.site) for layer in layers]),
            "height": 120 + rows_px(len(layers)),
        },
        headings=HEADINGS,
        rows=[row(layer) for layer in layers],
    )


def row(layer: PhysicalLoad) -> tuple[Cell, ...]:
    """The cells of `HEADINGS`."""
    uneven = (layer.expert_max_over_mean, layer.slot_max_over_mean, layer.rank_max_over_mean)
    worst = next((one.max_over_mean for one in layer.replicas), None)
    return (layer.site, layer.experts, len(layer.assignments), layer.maps, *uneven, worst)


def _held(layer: PhysicalLoad, slot: int) -> str:
    if slot >= len(layer.assignments):
        return ""
    rank = "" if layer.slot_ranks is None else f", rank {layer.slot_ranks[slot]}"
    return f"expert {layer.slot_experts[slot]}{rank}"
