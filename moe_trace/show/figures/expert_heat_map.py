"""Figures of load per expert of each layer, or per slot of a load balancer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_trace.data.calls.table import CallTable, load_by_step
from moe_trace.data.display.columns import Cell
from moe_trace.data.display.load_picture import DIVERGING
from moe_trace.data.load_stats import ENOUGH_PER_EXPERT, describe_load
from moe_trace.data.summary import RouterSummary, Summary
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.experts.physical import PhysicalLoad, PhysicalReport
from moe_trace.show.figures.figure import (
    Figure,
    Frame,
    Spec,
    cap_said,
    colour_cap,
    ids_axis,
    layers_map,
)

FRAMES_MAX = 60  # positions of the heat map's slider; more steps are grouped
FRAMES_CELLS_MAX = 250_000  # over all frames; with 61 layers x 256 experts a frame has 15,616
LOAD_HEADINGS = ("max÷mean", "CV", "Gini", "entropy", "busiest expert", "dead experts")
PHYSICAL_HEADINGS = ("layer", "experts", "slots", "maps", "by expert", "by slot", "by rank", "replicas")
Rows = list[list[float | None]]


def expert_heat_map(summary: Summary) -> Figure:
    """Plot layers x experts: each expert's assignments over the mean of its layer."""
    routers = [r for r in summary.routers if sum(r.assignments)]
    experts = max((len(r.assignments) for r in routers), default=0)
    overall = [equal_share_row(np.array(r.assignments), experts) for r in routers]
    frames = [Frame(label="all steps", z=overall)]
    if isinstance(summary, TraceSummary):
        frames += _step_frames(summary.calls, routers, experts)
    highest, note = _colour_limit(overall)
    data, layout = _diverging_map(overall, [r.info.site for r in routers], "expert", 0.0, 1.0, highest)
    return Figure(
        key="experts",
        title="Load of each expert",
        caption="Assignments of each expert over an equal share of its layer: 1× is even, more is orange, "
        f"less is blue, 0 is unused.{note}",
        data=data,
        layout=layout,
        frames=frames if len(frames) > 2 else [],
        headings=("layer", "tokens", *LOAD_HEADINGS),
        rows=[load_row(r.info.site, r.tokens, np.array(r.assignments)) for r in routers],
    )


def physical_figure(report: PhysicalReport | None) -> Figure:
    """Plot layers x slots: each slot's assignments over the mean of its layer; no data without slots."""
    layers = report.layers if report is not None else ()
    width = max((len(layer.assignments) for layer in layers), default=0)
    z = [equal_share_row(np.array(layer.assignments), width) for layer in layers]
    highest, note = _colour_limit(z)
    held: Spec = {
        "text": [[_slot_experts(layer, slot) for slot in range(width)] for layer in layers],
        "hovertemplate": "layer %{y}, slot %{x}: %{z:.2f}× equal share<extra>%{text}</extra>",
    }
    data, layout = _diverging_map(z, [layer.site for layer in layers], "slot", 0.0, 1.0, highest, **held)
    return Figure(
        key="physical",
        title="Load of each physical expert",
        caption="Assignments of each slot of the load balancer over an equal share of its layer; a slot's "
        "expert may change. In the table max÷mean: by logical expert, by slot, by the rank that holds it, "
        f"and the worst among one expert's replicas.{note}",
        data=data,
        layout=layout,
        headings=PHYSICAL_HEADINGS,
        rows=[physical_row(layer) for layer in layers],
    )


def difference_map(a: TraceSummary, b: TraceSummary) -> Figure:
    """Plot B − A of each expert's load over an equal share, for the layers that both have."""
    of_b = {router.info.name: router for router in b.routers}
    pairs = [(r, of_b[r.info.name]) for r in a.routers if r.info.name in of_b]
    pairs = [(x, y) for x, y in pairs if sum(x.assignments) and sum(y.assignments)]
    pairs = [(x, y) for x, y in pairs if len(x.assignments) == len(y.assignments)]  # same model only
    experts = max((len(x.assignments) for x, _ in pairs), default=0)
    z = [_difference(x, y, experts) for x, y in pairs]
    reach = max([0.25, *(abs(v) for row in z for v in row if v is not None)])
    sites = [x.info.site for x, _ in pairs]
    hover = "layer %{y}, expert %{x}: %{z:+.2f}× equal share<extra></extra>"
    data, layout = _diverging_map(z, sites, "expert", -reach, 0.0, reach, unit="×", hovertemplate=hover)
    return Figure(
        key="difference",
        title="Load of each expert, B − A",
        caption="How much more (orange) or less (blue) of an equal share each expert gets in B.",
        data=data,
        layout=layout,
        headings=(
            "layer",
            "max÷mean A",
            "max÷mean B",
            "largest rise",
            "of expert",
            "largest fall",
            "of expert ",
        ),
        rows=[_difference_row(pair, row) for pair, row in zip(pairs, z, strict=True)],
    )


def _diverging_map(
    z: Rows,
    sites: Sequence[str],
    column: str,
    low: float,
    centre: float,
    high: float,
    unit: str = "× equal",
    **more: Any,
) -> tuple[list[Spec], Spec]:
    """Return data and layout of layers x experts; both arms of the scale use their full range of colours.

    Args:
        column: what a column represents.
        more: further attributes of plotly's heat map.
    """
    middle = (centre - low) / (high - low)
    places = (0.0, middle / 2, middle, (1 + middle) / 2, 1.0)
    width = max(map(len, z), default=0)
    cells, layout = layers_map(
        sites,
        list(range(width)),
        z,
        unit,
        f"layer %{{y}}, {column} %{{x}}: %{{z:.2f}}× equal share",
        colorscale=[[round(place, 6), colour] for place, colour in zip(places, DIVERGING, strict=True)],
        zmin=low,
        zmax=high,
        **more,
    )
    return [cells] if z else [], {**layout, "xaxis": ids_axis(column, width)}


def _colour_limit(z: Rows) -> tuple[float, str]:
    """Return the highest multiple of an equal share with its own colour, and a note for the caption."""
    known = [value for row in z for value in row if value is not None]
    highest = max(2.0, colour_cap(known, least=4.0))
    return highest, cap_said(highest, known) if known else ""


def load_row(site: str, count: int, load_E: np.ndarray) -> tuple[Cell, ...]:
    """Return a layer, its tokens or assignments, and the cells of `LOAD_HEADINGS`.

    Experts without an assignment count as dead only where uniform routing would have reached all of them.
    """
    load, total = describe_load(load_E), int(load_E.sum())
    busiest = int(load_E.argmax()) if total else None
    dead = len(load.dead_experts) if total >= ENOUGH_PER_EXPERT * len(load_E) else None
    return (site, count, load.max_over_mean, load.cv, load.gini, load.entropy, busiest, dead)


def equal_share_row(load_E: np.ndarray, width: int) -> list[float | None]:
    """Return multiples of an equal share, None beyond the layer's own experts."""
    total = int(load_E.sum())
    row: list[float | None] = [None] * width
    if total:
        row[: len(load_E)] = np.round(load_E * (len(load_E) / total), 4).tolist()
    return row


def _step_frames(calls: CallTable, routers: Sequence[RouterSummary], experts: int) -> list[Frame]:
    steps, counts_SLE = load_by_step(calls, [router.info.name for router in routers], least=experts)
    max_frames = min(FRAMES_MAX, max(1, FRAMES_CELLS_MAX // max(1, len(routers) * experts)))
    parts = np.array_split(np.arange(len(steps)), min(len(steps), max_frames)) if len(steps) else []
    sizes = [len(router.assignments) for router in routers]
    return [
        Frame(
            label=step_label(int(steps[part[0]]), int(steps[part[-1]])),
            z=[
                equal_share_row(row[:size], experts)
                for row, size in zip(counts_SLE[part].sum(0), sizes, strict=True)
            ],
        )
        for part in parts
    ]


def step_label(first: int, last: int) -> str:
    """Return a label such as `step 3` or `steps 3 to 5`."""
    return f"step {first}" if first == last else f"steps {first} to {last}"


def physical_row(layer: PhysicalLoad) -> tuple[Cell, ...]:
    """Return the cells of `PHYSICAL_HEADINGS`."""
    uneven = (layer.expert_max_over_mean, layer.slot_max_over_mean, layer.rank_max_over_mean)
    worst = next((replica.max_over_mean for replica in layer.replicas), None)
    return (layer.site, layer.experts, len(layer.assignments), layer.maps, *uneven, worst)


def _slot_experts(layer: PhysicalLoad, slot: int) -> str:
    if slot >= len(layer.assignments):
        return ""
    rank = "" if layer.slot_ranks is None else f", rank {layer.slot_ranks[slot]}"
    return f"expert {layer.slot_experts[slot]}{rank}"


def _difference(a: RouterSummary, b: RouterSummary, experts: int) -> list[float | None]:
    shares = []
    for router in (a, b):
        counts = np.zeros(experts)
        counts[: len(router.assignments)] = router.assignments
        shares.append(counts * len(router.assignments) / counts.sum())
    return [round(float(v), 4) for v in shares[1] - shares[0]]


def _difference_row(pair: tuple[RouterSummary, RouterSummary], row: list[float | None]) -> tuple[Cell, ...]:
    values = np.array(row, dtype=np.float64)
    loads = [describe_load(router.assignments).max_over_mean for router in pair]
    increase, decrease = int(values.argmax()), int(values.argmin())
    return (pair[0].info.site, *loads, float(values[increase]), increase, float(values[decrease]), decrease)
