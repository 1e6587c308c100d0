"""Sharding of a model's parameters: the mesh dimensions they are split over, and the experts a rank holds.

It is read from DTensors and FSDP's own state, never from sizes in a config. In a torch built without
torch.distributed, nothing is sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from moe_trace.find.contracts.modules import expert_matrices


def held_experts(
    weights: Iterable[nn.Module], num_experts: int, data_parallel: DataParallelDims
) -> tuple[int, ...] | None:
    """Return the global ids of the experts that this process computes; None if all.

    FSDP's dimensions do not count: its shards are gathered before the experts compute. A serving engine's
    plain weights show no sharding, but its map from global to local ids does.

    Args:
        weights: modules that hold the experts' weights.
        num_experts: E.
        data_parallel: FSDP dimensions of the model that the experts belong to.
    """
    for module in weights:
        mapped = getattr(module, "expert_map", None)
        if isinstance(mapped, torch.Tensor) and mapped.shape == (num_experts,):  # vLLM: -1 on other ranks
            return tuple(torch.nonzero(mapped >= 0).flatten().tolist())
        for _, parameter in expert_matrices(module):
            split = list(expert_dims(parameter, data_parallel))
            if split:
                start, stop = _shard(parameter, split)
                return tuple(range(start, min(stop, num_experts)))
    return None


def expert_dims(parameter: Any, data_parallel: DataParallelDims) -> Iterator[int]:
    """Yield the dimensions of the parameter's mesh, of size > 1, over which its experts are split."""
    for dim in layout_dims(parameter, data_parallel):
        placement = parameter.placements[dim]
        if placement.is_shard() and placement.dim == 0:
            yield dim


def layout_dims(parameter: Any, data_parallel: DataParallelDims) -> Iterator[int]:
    """Yield the dimensions of the parameter's mesh, of size > 1, that are not FSDP's."""
    if is_dtensor(parameter):
        for dim in range(parameter.device_mesh.ndim):
            if parameter.device_mesh.size(dim) > 1 and not data_parallel.holds(parameter.device_mesh, dim):
                yield dim


def is_dtensor(value: Any) -> bool:
    """Return whether a value is a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _shard(parameter: Any, dims: Iterable[int]) -> tuple[int, int]:
    """Return this rank's range [start, stop) of dimension 0, which mesh dimensions split successively."""
    start, stop = 0, int(parameter.shape[0])
    for dim in dims:
        mesh = parameter.device_mesh
        first, last = chunk(stop - start, mesh.size(dim), mesh.get_local_rank(dim))
        start, stop = start + first, start + last
    return start, stop


def chunk(size: int, parts: int, part: int) -> tuple[int, int]:
    """Return a part's range [start, stop) as split by `torch.chunk` and `Shard`; the last may be empty."""
    width = -(-size // parts)
    return min(part * width, size), min((part + 1) * width, size)


def ranks_along(mesh: Any, dims: Iterable[int]) -> tuple[int, ...]:
    """Return the global ranks that differ from this one only along `dims`, in the order of their shards."""
    coordinate = mesh.get_coordinate()
    wanted = set(dims)
    index = tuple(slice(None) if dim in wanted else coordinate[dim] for dim in range(mesh.ndim))
    return tuple(mesh.mesh[index].flatten().tolist())


class DataParallelDims:
    """The mesh dimensions over which FSDP 2 shards or replicates the modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.meshes = [info.mesh for info in fsdp_mesh_infos(model)]
        self._names = {name for mesh in self.meshes for name in mesh.mesh_dim_names or ()}

    def holds(self, mesh: Any, dim: int) -> bool:
        """Return whether a mesh dimension is FSDP's. A mesh without names is compared as a whole."""
        if mesh.mesh_dim_names is None:
            return any(mesh == other for other in self.meshes)
        return mesh.mesh_dim_names[dim] in self._names


def fsdp_mesh_infos(model: nn.Module) -> list[Any]:
    """Return FSDP 2's mesh infos (`mesh`, `shard_mesh_dim`, ...), one for each distinct mesh."""
    found: dict[int, Any] = {}
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is None:
            continue
        state = state()  # private API, of which both known forms are supported
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [group] if (group := getattr(state, "_fsdp_param_group", None)) is not None else []
        for group in groups:
            found.setdefault(hash(group.mesh_info.mesh), group.mesh_info)
    return list(found.values())
