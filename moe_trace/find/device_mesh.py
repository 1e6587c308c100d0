"""What the layout of a model's parameters says: what is split over which mesh, and who holds which experts.

Read from the DTensors and from FSDP's own state, never from sizes that a config asked for. Where
torch.distributed is not part of torch, nothing is sharded.
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
    """Global ids of the experts whose weights this process computes with; None where it is all of them.

    A dimension of FSDP's does not count: its shards are gathered before the experts compute. A serving
    engine's plain weights tell nothing, but its map from global to local ids does.

    Args:
        weights: the modules that hold the experts' weights.
        num_experts: E.
        data_parallel: of the model that the experts belong to.
    """
    for module in weights:
        mapped = getattr(module, "expert_map", None)
        if isinstance(mapped, torch.Tensor) and mapped.shape == (num_experts,):  # vLLM: -1 is held elsewhere
            return tuple(torch.nonzero(mapped >= 0).flatten().tolist())
        for _, parameter in expert_matrices(module):
            split = list(expert_dims(parameter, data_parallel))
            if split:
                start, stop = _shard(parameter, split)
                return tuple(range(start, min(stop, num_experts)))
    return None


def expert_dims(parameter: Any, data_parallel: DataParallelDims) -> Iterator[int]:
    """Dimensions of the parameter's mesh, of more than one rank, over which its experts are split."""
    for dim in layout_dims(parameter, data_parallel):
        placement = parameter.placements[dim]
        if placement.is_shard() and placement.dim == 0:
            yield dim


def layout_dims(parameter: Any, data_parallel: DataParallelDims) -> Iterator[int]:
    """Dimensions of the parameter's mesh, of more than one rank, that are not FSDP's."""
    if is_dtensor(parameter):
        for dim in range(parameter.device_mesh.ndim):
            if parameter.device_mesh.size(dim) > 1 and not data_parallel.holds(parameter.device_mesh, dim):
                yield dim


def is_dtensor(value: Any) -> bool:
    """Whether it is a tensor laid out over a mesh."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _shard(parameter: Any, dims: Iterable[int]) -> tuple[int, int]:
    """[start, stop) of dimension 0 on this rank; each mesh dimension cuts what the one before left."""
    start, stop = 0, int(parameter.shape[0])
    for dim in dims:
        mesh = parameter.device_mesh
        first, last = chunk(stop - start, mesh.size(dim), mesh.get_local_rank(dim))
        start, stop = start + first, start + last
    return start, stop


def chunk(size: int, parts: int, part: int) -> tuple[int, int]:
    """[start, stop) of one part as `torch.chunk` and `Shard` cut: the last ones may be short, or empty."""
    width = -(-size // parts)
    return min(part * width, size), min((part + 1) * width, size)


def ranks_along(mesh: Any, dims: Iterable[int]) -> tuple[int, ...]:
    """Global ranks that differ from this one only along `dims`, in the order of their shards."""
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
        """Whether this dimension is FSDP's. A mesh without names is compared as a whole."""
        if mesh.mesh_dim_names is None:
            return any(mesh == other for other in self.meshes)
        return mesh.mesh_dim_names[dim] in self._names


def fsdp_mesh_infos(model: nn.Module) -> list[Any]:
    """FSDP 2's own record of its mesh, one for each different mesh: `mesh`, `shard_mesh_dim`, ..."""
    found: dict[int, Any] = {}
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is None:
            continue
        state = state()  # private, so both of its forms are tried
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [group] if (group := getattr(state, "_fsdp_param_group", None)) is not None else []
        for group in groups:
            found.setdefault(hash(group.mesh_info.mesh), group.mesh_info)
    return list(found.values())
