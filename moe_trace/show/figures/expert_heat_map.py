"""The figure of load: what each expert of each layer receives, over all steps and step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.calls.table import CallTable, load_by_step
from moe_trace.data.display.colours import DIVERGING
from moe_trace.data.summary import RouterSummary, Summary
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.figure import (
    Cell,
    Figure,
    Frame,
    Spec,
    cap_said,
    colour_cap,
    heat_map,
    ids_axis,
    layers_axis,
    rows_px,
    safe,
)

FRAMES_MAX = 60  # of the heat map's slider; more steps are taken together
FRAMES_CELLS_MAX = 250_000  # of all frames: with 61 layers x 256 experts a frame has 15,616


def expert_heat_map(summary: Summary) -> Figure:
    """Layers x experts: each expert's assignments over the mean of its layer."""
    routers = [r for r in summary.routers if sum(r.assignments)]
    experts = max((len(r.assignments) for r in routers), default=0)
    overall = [equal_share_row(np.array(r.assignments), experts) for r in routers]
    frames = [Frame(label="all steps", z=overall)]
    if isinstance(summary, TraceSummary):
        frames += _step_frames(summary.calls, routers, experts)
    known = [value for row in overall for value in row if value is not None]
    highest = max(2.0, colour_cap(known, least=4.0))
    data = heat_map_trace(
        overall, [r.info.site for r in routers], low=0.0, centre=1.0, high=highest, unit="× equal"
    )
    return Figure(
        key="experts",
        title="Load of each expert",
        caption="Assignments of each expert over an equal share of its layer: 1× is even, more is orange, "
        "less is blue, 0 is unused." + (cap_said(highest, known) if known else ""),
        data=[data] if routers else [],
        layout={
            "xaxis": ids_axis("expert", experts),
            "yaxis": layers_axis([safe(r.info.site) for r in routers]),
            "height": 120 + rows_px(len(routers)),
        },
        frames=frames if len(frames) > 2 else [],
        headings=("layer", "tokens", "max÷mean", "CV", "Gini", "entropy", "busiest expert", "dead experts"),
        rows=[_load_row(r) for r in routers],
    )


def heat_map_trace(
    z: list[list[float | None]], sites: Sequence[str], *, low: float, centre: float, high: float, unit: str
) -> Spec:
    """Layers x experts on a diverging scale: both arms use all of their colours, however uneven they are."""
    middle = (centre - low) / (high - low)
    places = (0.0, middle / 2, middle, (1 + middle) / 2, 1.0)
    return heat_map(
        z,
        list(range(max(map(len, z), default=0))),
        [safe(site) for site in sites],
        unit,
        "layer %{y}, expert %{x}: %{z:.2f}× equal share",
        colorscale=[[round(place, 6), colour] for place, colour in zip(places, DIVERGING, strict=True)],
        zmin=low,
        zmax=high,
    )


def _load_row(router: RouterSummary) -> tuple[Cell, ...]:
    load = router.load
    busiest = max(range(len(router.assignments)), key=router.assignments.__getitem__)
    dead = len(load.dead_experts) if router.chance.tells_dead else None
    figures = (load.max_over_mean, load.cv, load.gini, load.entropy)
    return (router.info.site, router.tokens, *figures, busiest, dead)


def equal_share_row(load_E: np.ndarray, width: int) -> list[float | None]:
    """Multiples of an equal share, None beyond the layer's own experts."""
    total = int(load_E.sum())
    row: list[float | None] = [None] * width
    if total:
        row[: len(load_E)] = np.round(load_E * (len(load_E) / total), 4).tolist()
    return row


def _step_frames(calls: CallTable, routers: Sequence[RouterSummary], experts: int) -> list[Frame]:
    steps, counts_SLE = load_by_step(calls, [router.info.name for router in routers], least=experts)
    most = min(FRAMES_MAX, max(1, FRAMES_CELLS_MAX // max(1, len(routers) * experts)))
    parts = np.array_split(np.arange(len(steps)), min(len(steps), most)) if len(steps) else []
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
    """`step 3`, `steps 3 to 5`."""
    return f"step {first}" if first == last else f"steps {first} to {last}"
