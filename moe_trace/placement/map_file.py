"""The exported placement map from slots of ranks to experts (schema: docs/placement.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from moe_trace.data.errors import TraceFileError
from moe_trace.data.files import whole_file
from moe_trace.placement.plan import Ints
from moe_trace.placement.study import PlacementStudy

MAP_VERSION = 1


class LayerMap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The map of one layer. Physical slot p of P is slot p mod P/R of rank p div P/R."""

    site: str
    physical_to_logical: list[list[int]]
    """[R][P/R] expert held by each slot of each rank."""
    logical_to_physical: list[list[int]]
    """[E][copies] physical slots of each expert, ascending."""
    replica_count: list[int]
    """[E] number of copies of each expert."""


class PlanMap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One plan for one cluster size."""

    plan: str
    ranks: int
    nodes: int
    slots_per_rank: int
    layers: list[LayerMap]


class PlacementMap(msgspec.Struct, kw_only=True):
    """The whole file. Keys may be added over time, but are never renamed."""

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
        OutputError: The file cannot be written.
    """
    counts = study.counts
    placement = PlacementMap(
        model=counts.model,
        source=os.fsencode(counts.source).decode("utf-8", "backslashreplace"),
        chosen_on=[counts.labels[i] for i in study.split.chosen],
        num_experts=counts.num_experts,
        plans=[
            PlanMap(
                plan=plan.name,
                ranks=plan.cluster.ranks,
                nodes=plan.cluster.nodes,
                slots_per_rank=plan.slots_per_rank,
                layers=[
                    _layer_map(layer.site, experts_P, counts.num_experts, plan.cluster.ranks)
                    for layer, experts_P in zip(counts.layers, plan.experts_LP, strict=True)
                ],
            )
            for cluster in study.clusters
            for plan in cluster.final
        ],
    )
    with whole_file(target) as temporary:
        temporary.write_bytes(msgspec.json.encode(placement) + b"\n")


def _layer_map(site: str, experts_P: Ints, num_experts: int, ranks: int) -> LayerMap:
    counts = np.bincount(experts_P, minlength=num_experts)
    slots = np.argsort(experts_P, kind="stable")
    return LayerMap(
        site=site,
        physical_to_logical=experts_P.reshape(ranks, -1).tolist(),
        logical_to_physical=[part.tolist() for part in np.split(slots, np.cumsum(counts)[:-1])],
        replica_count=counts.tolist(),
    )


def read_map(path: Path) -> PlacementMap:
    """Read and validate a map.

    Raises:
        TraceFileError: The file is not a placement map, has another version, or contradicts itself.
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
    experts = [expert for rank in layer.physical_to_logical for expert in rank]
    is_consistent = (
        plan.ranks > 0
        and len(experts) == plan.ranks * plan.slots_per_rank
        and len(set(experts)) == num_experts
        and all(0 <= expert < num_experts for expert in experts)
        and layer == _layer_map(layer.site, np.array(experts, np.int64), num_experts, plan.ranks)
    )
    if not is_consistent:
        raise TraceFileError(
            f"{path}: the map of {layer.site} ({plan.plan}, {plan.ranks} ranks) contradicts itself; the file "
            "was changed after it was written"
        )
