"""A study of placements as text and JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_trace.data.display.columns import text_table
from moe_trace.data.display.json import attributes, json_text
from moe_trace.data.display.tables import fixed, paragraph, printable, scaled, wrapped
from moe_trace.data.schema import SCHEMA_VERSION
from moe_trace.placement.plan import Floats
from moe_trace.placement.study import ClusterStudy, JudgedPlan, PlacementStudy

_LAYERS_SHOWN = 12


def render_placement_text(study: PlacementStudy, *, every_layer: bool = False) -> str:
    """What was read and how it was split, all cluster sizes side by side, then each one's layers."""
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
    return "\n".join(lines) + "\n" + paragraph(printable(_sentence(study.split.words), 1000))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _overview(study: PlacementStudy) -> str:
    unit = study.counts.kind
    headings = [
        "ranks",
        "plan",
        "slots",
        "max÷mean",
        "range",
        f"a {unit}",
        "better",
        "in node",
        "off node",
    ]
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
) -> list[str]:
    size = cluster.options.cluster
    ranks = f"{size.ranks}" if size.nodes == 1 else f"{size.ranks} on {size.nodes}"
    slots = next(p.slots_per_rank for p in cluster.final if p.name == plan.name)
    same, other = _moved(study, plan)
    return [
        ranks if first else "",
        plan.name,
        str(slots),
        fixed(float(plan.all_layers_F.mean()), 3),
        _range(plan.all_layers_F),
        fixed(_finite(_mean_of(plan.per_observation_FL)), 3),
        _better(plan, cluster.plans[0]),
        same,
        other if size.nodes > 1 else "-",
    ]


def _better(plan: JudgedPlan, contiguous: JudgedPlan) -> str:
    if plan is contiguous:
        return "-"
    known = np.isfinite(contiguous.max_over_mean_FL)
    return f"{int((plan.max_over_mean_FL < contiguous.max_over_mean_FL).sum())} of {int(known.sum())}"


def _moved(study: PlacementStudy, plan: JudgedPlan) -> tuple[str, str]:
    parts = (plan.volume.own_node_L, plan.volume.other_node_L)
    if _bytes_known(study):
        each = np.array([layer.slot_bytes for layer in study.counts.layers], dtype=np.float64)
        same, other = (float((part * each).sum()) * 2 / study.observations for part in parts)
        return scaled(same, "B"), scaled(other, "B")
    total = float(sum(part.sum() for part in (*parts, plan.volume.own_rank_L)))
    same, other = (100 * float(part.sum()) / total for part in parts)
    return f"{same:.1f} %", f"{other:.1f} %"


def _bytes_known(study: PlacementStudy) -> bool:
    return all(layer.slot_bytes is not None for layer in study.counts.layers)


def _layers(study: PlacementStudy, cluster: ClusterStudy, *, every_layer: bool) -> str:
    """One row a layer, the most uneven first where not all are shown."""
    size = cluster.options.cluster
    contiguous = np.nan_to_num(_mean(cluster.plans[0].max_over_mean_FL), nan=-1.0)
    order = np.arange(len(contiguous))
    shown = order
    if not every_layer and len(order) > _LAYERS_SHOWN:
        shown = np.argsort(-contiguous, kind="stable")[:_LAYERS_SHOWN]
    headings = ["layer", "bound"]
    for plan in cluster.plans:
        headings += [plan.name] if len(plan.all_layers_F) == 1 else [plan.name, "worst"]
    rows = []
    for i in shown:
        row = [
            printable(study.counts.layers[i].site, 12),
            fixed(_finite(_mean(cluster.least_without_copies_FL)[i]), 3),
        ]
        for plan in cluster.plans:
            row.append(fixed(_finite(_mean(plan.max_over_mean_FL)[i]), 3))
            if len(plan.all_layers_F) > 1:
                row.append(fixed(_finite(_worst(plan.max_over_mean_FL[:, i])), 2))
        rows.append(row)
    nodes = f" on {size.nodes} nodes" if size.nodes > 1 else ""
    folds = "mean over folds and worst fold; " if len(cluster.plans[0].all_layers_F) > 1 else ""
    title = (
        f"{size.ranks} ranks{nodes}, layer by layer "
        f"(max÷mean, {folds}no plan without copies goes below the bound)"
    )
    if len(shown) < len(order):
        title += f". The {len(shown)} most uneven of {len(order)} layers; --all shows the others"
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
        worse = [
            p for p in cluster.plans[1:] if p.all_layers_F.mean() >= cluster.plans[0].all_layers_F.mean()
        ]
        if worse and size.ranks > 1 and size.ranks != study.counts.num_experts:
            names = " and ".join(plan.name for plan in worse)
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


def _mean(values_FL: Floats) -> Floats:
    """Mean over folds, [L]; NaN only where no fold has a load."""
    known = np.isfinite(values_FL)
    total = np.where(known, values_FL, 0.0).sum(axis=0)
    return np.divide(total, known.sum(axis=0), out=np.full(total.shape, np.nan), where=known.any(axis=0))


def _mean_of(values_FL: Floats) -> float:
    known = values_FL[np.isfinite(values_FL)]
    return float(known.mean()) if known.size else float("nan")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _worst(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else float("nan")


def _range(values: Floats) -> str:
    known = values[np.isfinite(values)]
    if known.size < 2:
        return "-"
    return f"{known.min():.2f}-{known.max():.2f}"


def render_placement_json(study: PlacementStudy) -> str:
    """Everything, per layer and fold; without the maps, which `--out` writes."""
    counts = study.counts
    folds = [
        {part: [counts.labels[i] for i in getattr(fold, part)] for part in ("chosen", "judged")}
        for fold in study.split.folds
    ]
    return json_text(
        {
            "schema_version": SCHEMA_VERSION,
            **attributes(counts, "source", "model", "kind", "labels", "num_experts"),
            "layers": [attributes(one, "site", "name", "layer", "slot_bytes") for one in counts.layers],
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
            "slots_own_rank": plan.volume.own_rank_L,
            "slots_own_node": plan.volume.own_node_L,
            "slots_other_node": plan.volume.other_node_L,
        }
        for plan in cluster.plans
    ]
    return {
        **attributes(cluster.options.cluster, "ranks", "nodes"),
        **attributes(cluster.options, "replicas", "groups", "hedge"),
        "least_without_copies": cluster.least_without_copies_FL,
        "plans": plans,
    }
