"""Render a study of placements as text and JSON."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from moe_trace.data.display.columns import Cell, Column, text_table
from moe_trace.data.display.json import attributes, json_text
from moe_trace.data.display.tables import fixed, paragraph, printable, scaled, wrapped
from moe_trace.data.schema import SCHEMA_VERSION
from moe_trace.placement.evaluation import WHERE, known_mean
from moe_trace.placement.study import ClusterStudy, JudgedPlan, PlacementStudy

_LAYERS_SHOWN = 12
_three_decimals = partial(fixed, decimals=3)


def render_placement_text(study: PlacementStudy, *, every_layer: bool = False) -> str:
    """Render the input and its split, all cluster sizes side by side, then the layers of each."""
    parts = [_heading(study), _overview(study)]
    parts += [_layers(study, cluster, every_layer=every_layer) for cluster in study.clusters]
    notes = [*study.counts.notes, *_advice(study)]
    parts.append("Notes\n" + "\n".join(wrapped(printable(note, 1000)) for note in notes))
    return "\n\n".join(parts) + "\n"


def _heading(study: PlacementStudy) -> str:
    counts = study.counts
    facts = (
        f"{len(counts.layers)} layers of {counts.num_experts} experts, {len(counts.labels)} {counts.kind}"
        f"{'s' * (len(counts.labels) != 1)}, {int(counts.counts_SLE.sum()):,} assignments"
    )
    lines = [printable(counts.source, 200), printable(counts.model), paragraph(facts)]
    words = study.split.words
    return "\n".join(lines) + "\n" + paragraph(printable(f"{words[0].upper()}{words[1:]}.", 1000))


def _overview(study: PlacementStudy) -> str:
    unit = study.counts.kind
    headings: list[str | Column] = ["ranks", "plan", "slots", "max÷mean", "range"]
    headings += [Column(f"a {unit}", terminal=_three_decimals), "better", "in node", "off node"]
    rows = [
        _overview_row(study, cluster, plan, first=i == 0)
        for cluster in study.clusters
        for i, plan in enumerate(cluster.plans)
    ]
    moved = f"bytes a {unit}, both ways" if _bytes_known(study) else "share of all slots"
    note = (
        f"All layers: busiest rank ÷ mean rank, its range over folds, the mean of single {unit}s, and in how "
        "many layers and folds the plan is better than contiguous. In node, off node: moved "
        f"to other ranks of the same node and to other nodes, {moved}."
    )
    return text_table(headings, rows, left=2, title=note)


def _overview_row(
    study: PlacementStudy, cluster: ClusterStudy, plan: JudgedPlan, *, first: bool
) -> list[Cell]:
    size, contiguous = cluster.options.cluster, cluster.plans[0]
    same, other = _traffic(study, plan)
    better = plan.max_over_mean_FL < contiguous.max_over_mean_FL
    folds = plan.all_layers_F[np.isfinite(plan.all_layers_F)]
    return [
        "" if not first else f"{size.ranks}" if size.nodes == 1 else f"{size.ranks} on {size.nodes}",
        plan.name,
        next(final.slots_per_rank for final in cluster.final if final.name == plan.name),
        float(plan.all_layers_F.mean()),
        f"{folds.min():.2f}-{folds.max():.2f}" if len(folds) > 1 else None,
        float(known_mean(plan.per_observation_FL)),
        None
        if plan is contiguous
        else f"{int(better.sum())} of {int(np.isfinite(contiguous.max_over_mean_FL).sum())}",
        same,
        other if size.nodes > 1 else None,
    ]


def _traffic(study: PlacementStudy, plan: JudgedPlan) -> tuple[str, str]:
    """Return the traffic to other ranks of the same node, and to other nodes."""
    if _bytes_known(study):
        bytes_L = np.array([layer.slot_bytes for layer in study.counts.layers], np.float64)
        _, same, other = (plan.slots_WL @ bytes_L * 2 / study.observations).tolist()
        return scaled(same, "B"), scaled(other, "B")
    _, same, other = (100 * plan.slots_WL.sum(axis=1) / plan.slots_WL.sum()).tolist()
    return f"{same:.1f} %", f"{other:.1f} %"


def _bytes_known(study: PlacementStudy) -> bool:
    return all(layer.slot_bytes is not None for layer in study.counts.layers)


def _layers(study: PlacementStudy, cluster: ClusterStudy, *, every_layer: bool) -> str:
    """Render one row per layer, the most uneven first where not all are shown."""
    several = len(cluster.least_without_copies_FL) > 1
    headings = [Column("layer", width=12), Column("bound", terminal=_three_decimals)]
    columns_L = [known_mean(cluster.least_without_copies_FL, axis=0)]
    for plan in cluster.plans:
        headings.append(Column(plan.name, terminal=_three_decimals))
        columns_L.append(known_mean(plan.max_over_mean_FL, axis=0))
        if several:
            headings.append(Column("worst", terminal=partial(fixed, decimals=2)))
            columns_L.append(np.fmax.reduce(plan.max_over_mean_FL, axis=0))
    sites, order = [layer.site for layer in study.counts.layers], np.arange(len(study.counts.layers))
    if not every_layer and len(sites) > _LAYERS_SHOWN:
        contiguous = np.nan_to_num(columns_L[1], nan=-1.0)
        order = np.argsort(-contiguous, kind="stable")[:_LAYERS_SHOWN]
    rows: list[list[Cell]] = [[sites[i], *(float(column[i]) for column in columns_L)] for i in order.tolist()]
    size = cluster.options.cluster
    nodes = f" on {size.nodes} nodes" if size.nodes > 1 else ""
    folds = "mean over folds and worst fold; " if several else ""
    title = (
        f"{size.ranks} ranks{nodes}, layer by layer "
        f"(max÷mean, {folds}no plan without copies goes below the bound)"
    )
    if len(order) < len(sites):
        title += f". The {len(order)} most uneven of {len(sites)} layers; --all shows the others"
    return text_table(headings, rows, title=title)


def _advice(study: PlacementStudy) -> list[str]:
    notes = []
    if study.split.in_sample:
        notes.append(
            "In-sample: the plans were judged on what they were chosen on, so other inputs will be less "
            "even. Record two steps or more, of different traffic that you expect, or several texts."
        )
    for cluster in study.clusters:
        size = cluster.options.cluster
        if size.ranks == study.counts.num_experts:
            notes.append(f"{size.ranks} ranks: one expert a rank, so only copies can balance.")
        worse_plans = [
            p for p in cluster.plans[1:] if p.all_layers_F.mean() >= cluster.plans[0].all_layers_F.mean()
        ]
        if worse_plans and size.ranks > 1 and size.ranks != study.counts.num_experts:
            names = " and ".join(plan.name for plan in worse_plans)
            notes.append(
                f"{size.ranks} ranks: {names} did not beat contiguous on what was held out: the load there "
                f"differs from the {study.counts.kind}s chosen on. Choose on a mix of what you serve."
            )
    copies = {c.options.replicas * c.options.cluster.ranks for c in study.clusters}
    notes.append(
        f"The plans with copies hold {' / '.join(map(str, sorted(copies)))} experts a layer more than the "
        "others, in memory."
    )
    if not _bytes_known(study):
        notes.append("The source does not tell the size of a hidden state; --slot-bytes gives bytes moved.")
    return notes


def render_placement_json(study: PlacementStudy) -> str:
    """Render all results per layer and fold, except the maps, which `--out` writes."""
    counts = study.counts
    folds = [
        {part: [counts.labels[i] for i in getattr(fold, part)] for part in ("chosen", "judged")}
        for fold in study.split.folds
    ]
    return json_text(
        {
            "schema_version": SCHEMA_VERSION,
            **attributes(counts, "source", "model", "kind", "labels", "num_experts"),
            "layers": [attributes(layer, "site", "name", "layer", "slot_bytes") for layer in counts.layers],
            "split": {**attributes(study.split, "words", "in_sample"), "folds": folds},
            "judged_observations": study.observations,
            "clusters": [_cluster(cluster) for cluster in study.clusters],
            "notes": [*counts.notes, *_advice(study)],
        }
    )


def _cluster(cluster: ClusterStudy) -> dict[str, Any]:
    plans = [
        {
            "plan": plan.name,
            "max_over_mean_all_layers": plan.all_layers_F,
            "max_over_mean": plan.max_over_mean_FL,
            "max_over_mean_per_observation": plan.per_observation_FL,
            "rank_loads": plan.loads_LR,
            **{f"slots_{where}": slots for where, slots in zip(WHERE, plan.slots_WL, strict=True)},
        }
        for plan in cluster.plans
    ]
    return {
        **attributes(cluster.options.cluster, "ranks", "nodes"),
        **attributes(cluster.options, "replicas", "groups", "hedge"),
        "least_without_copies": cluster.least_without_copies_FL,
        "plans": plans,
    }
