"""The exported map: which expert stands in which slot of which rank (docs/placement.md has the schema)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from moe_trace.data.errors import TraceFileError
from moe_trace.data.files import whole_file
from moe_trace.placement.plan import Plan
from moe_trace.placement.study import PlacementStudy

MAP_VERSION = 1


class LayerMap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One layer. Physical slot p of P is slot p mod P/R of rank p div P/R."""

    site: str
    physical_to_logical: list[list[int]]
    """[R][P/R] the expert that each slot of each rank holds."""
    logical_to_physical: list[list[int]]
    """[E][copies] the physical slots of each expert, ascending."""
    replica_count: list[int]
    """[E]"""


class PlanMap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One plan for one cluster size."""

    plan: str
    ranks: int
    nodes: int
    slots_per_rank: int
    layers: list[LayerMap]


class PlacementMap(msgspec.Struct, kw_only=True):
    """The whole file; keys are added over time, never renamed."""

    format: Literal["moe_trace.placement"] = "moe_trace.placement"
    version: int = MAP_VERSION
    model: str
    source: str
    chosen_on: list[str]
    num_experts: int
    plans: list[PlanMap]


def write_map(study: PlacementStudy, target: Path) -> None:
    """Write the plans of all cluster sizes as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    chosen = sorted({i for fold in study.split.folds for i in fold.chosen})
    plans = [
        _plan_map(plan, [layer.site for layer in study.counts.layers])
        for cluster in study.clusters
        for plan in cluster.final
    ]
    found = PlacementMap(
        model=study.counts.model,
        source=os.fsencode(study.counts.source).decode("utf-8", "backslashreplace"),
        chosen_on=[study.counts.labels[i] for i in chosen],
        num_experts=study.counts.num_experts,
        plans=plans,
    )
    with whole_file(target) as temporary:
        temporary.write_bytes(msgspec.json.encode(found) + b"\n")


def _plan_map(plan: Plan, sites: Sequence[str]) -> PlanMap:
    return PlanMap(
        plan=plan.name,
        ranks=plan.cluster.ranks,
        nodes=plan.cluster.nodes,
        slots_per_rank=plan.slots_per_rank,
        layers=[_layer_map(site, row, plan) for site, row in zip(sites, plan.experts_LP, strict=True)],
    )


def _layer_map(site: str, experts_P: np.ndarray, plan: Plan) -> LayerMap:
    counts = np.bincount(experts_P, minlength=plan.num_experts)
    slots = np.argsort(experts_P, kind="stable")
    return LayerMap(
        site=site,
        physical_to_logical=experts_P.reshape(plan.cluster.ranks, -1).tolist(),
        logical_to_physical=[part.tolist() for part in np.split(slots, np.cumsum(counts)[:-1])],
        replica_count=counts.tolist(),
    )


def read_map(path: Path) -> PlacementMap:
    """Read and check a map.

    Raises:
        TraceFileError: not such a file, of another version, or parts that contradict each other.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=PlacementMap)
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise TraceFileError(
            f"{path}: found no placement map ({error}); write one with `moe-trace placement --out`"
        ) from error
    if found.version != MAP_VERSION:
        raise TraceFileError(f"{path}: found version {found.version} of the map, expected {MAP_VERSION}")
    for plan in found.plans:
        for layer in plan.layers:
            _check(path, found.num_experts, plan, layer)
    return found


def _check(path: Path, num_experts: int, plan: PlanMap, layer: LayerMap) -> None:
    held = [expert for rank in layer.physical_to_logical for expert in rank]
    sizes = {len(rank) for rank in layer.physical_to_logical}
    slots: list[list[Any]] = [[] for _ in range(num_experts)]
    if all(0 <= expert < num_experts for expert in held):
        for slot, expert in enumerate(held):
            slots[expert].append(slot)
    right = (
        len(layer.physical_to_logical) == plan.ranks
        and sizes == {plan.slots_per_rank}
        and slots == layer.logical_to_physical
        and [len(s) for s in slots] == layer.replica_count
        and all(slots)
    )
    if not right:
        raise TraceFileError(
            f"{path}: the map of {layer.site} ({plan.plan}, {plan.ranks} ranks) contradicts itself; the file "
            "was changed after it was written"
        )
