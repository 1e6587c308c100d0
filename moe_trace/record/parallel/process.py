"""Role of the process in a distributed run, read from the model.

transformers keeps the meshes that it built (`_mesh_manager`); for other models, the wrappers (DDP, FSDP) and
the layout of the parameters are read. A model with none of them runs on this process alone: its tokens are
its own, whatever other processes do. A serving engine keeps its own groups (`engine.py`).

Nothing here starts a collective: groups, ranks and layouts are known to every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moe_trace.data.schema import ExpertExchange, Parallel, RoutingSample
from moe_trace.find.contracts.modules import expert_matrices
from moe_trace.find.device_mesh import (
    DataParallelDims,
    chunk,
    expert_dims,
    fsdp_mesh_infos,
    layout_dims,
    ranks_along,
)
from moe_trace.record.parallel.dispatch import DispatchInfo
from moe_trace.record.parallel.engine import engine_layout
from moe_trace.record.parallel.environment import rank_and_world_size

MESH_DIMS = ("dp", "dp_replicate", "fsdp", "tp", "ep", "etp", "pp")


class ParallelModel:
    """The role of this process in the run of `model`.

    It must be created while the process group exists, and stays valid after the group is destroyed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rank, self.world_size = rank_and_world_size()
        self._exchange: str | None = None
        self._tokens_shared_by: tuple[int, ...] = (self.rank,)
        self._expert_ranks: tuple[int, ...] = ()
        self._sizes: dict[str, int] = {}
        if self.world_size == 1:
            return
        self._read_wrappers(model)
        holder = next((m for m in model.modules() if getattr(m, "_mesh_manager", None) is not None), None)
        engine = engine_layout(model)
        if holder is not None:
            self._read_manager(holder)
        elif engine is not None:
            self._sizes = dict(engine.sizes)
            self._tokens_shared_by, self._expert_ranks = engine.token_ranks, engine.expert_ranks
            self._exchange = engine.exchange
        else:
            self._read_layouts(model)

    @property
    def _shares_batch(self) -> bool:
        return self._expert_ranks == self._tokens_shared_by

    def describe(self, samples: Iterable[RoutingSample]) -> Parallel | None:
        """Return the parallel layout for the recording, or None if the process runs alone.

        Args:
            samples: samples of the recording. Under `ep_implementation="auto"` each forward chooses the
                exchange, which only they show; it is all-to-all if any forward used that.
        """
        if self.world_size == 1:
            return None
        return Parallel(
            mesh={name: self._sizes[name] for name in MESH_DIMS if self._sizes.get(name, 1) > 1},
            token_ranks=tuple(sorted(self._tokens_shared_by)),
            expert_ranks=self._expert_ranks,
            expert_exchange=self._exchange_of(samples),
        )

    def _exchange_of(self, samples: Iterable[RoutingSample]) -> ExpertExchange | None:
        if not self._expert_ranks or self._exchange is None:
            return None
        if self._exchange == "all_reduce":
            return "all_reduce"
        if self._exchange == "auto" and self._shares_batch:
            sent = any(s.dispatched is not None and s.dispatched.any() for s in samples)
            return "all_to_all" if sent else "all_reduce"
        return "all_to_all"

    def sending(self, experts_args: Sequence[Any] | None) -> DispatchInfo | None:
        """Return what the call of an experts module with these arguments moves. Runs inside the forward.

        The first argument is the hidden states [T, hidden]. Tensor-parallel ranks, which all have the same
        tokens, each dispatch the slice that `torch.chunk` gives them (transformers' `AllToAllEP`).
        """
        if self.world_size == 1 or not experts_args or not isinstance(experts_args[0], Tensor):
            return None
        hidden = experts_args[0]
        slot_bytes = hidden.shape[-1] * hidden.element_size()
        sharers = self._tokens_shared_by
        if not self._expert_ranks or self._exchange in (None, "all_reduce") or len(sharers) == 1:
            return DispatchInfo(slot_bytes)
        gradients = torch.is_grad_enabled() and hidden.requires_grad
        if self._exchange == "auto" and self._shares_batch and not gradients:
            return DispatchInfo(slot_bytes, (0, 0))  # this forward uses all-reduce and dispatches nothing
        return DispatchInfo(slot_bytes, chunk(hidden.shape[0], len(sharers), sharers.index(self.rank)))

    # -- reading the model ----------------------------------------------------------------------------

    def _read_manager(self, holder: Any) -> None:
        """Read the meshes that transformers built, and how its experts receive their tokens."""
        manager = holder._mesh_manager
        for name in ("pp", "dp_replicate", "fsdp", "tp", "ep"):
            self._sizes[name] = manager.get_mesh(name).size()
        # Ranks are in mesh order, which is the order of slices and shards.
        tensor, experts = manager.get_mesh("tp"), manager.get_mesh("ep")
        self._tokens_shared_by = ranks_along(tensor, range(tensor.ndim))
        if experts.size() > 1:
            self._expert_ranks = ranks_along(experts, range(experts.ndim))
            self._exchange = _exchange_name(holder.config)

    def _read_wrappers(self, model: nn.Module) -> None:
        """Read the sizes of DDP and FSDP, under which each rank has its own tokens."""
        from torch.nn.parallel import DistributedDataParallel

        module: Any
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                self._sizes["dp_replicate"] = distributed.get_world_size(module.process_group)
            elif hasattr(module, "_fsdp_wrapped_module"):  # FSDP 1
                self._sizes["fsdp"] = distributed.get_world_size(module.process_group)
        for info in fsdp_mesh_infos(model):
            if info.shard_mesh_dim is not None:
                self._widen("fsdp", info.mesh.size(info.shard_mesh_dim))
            if info.replicate_mesh_dim is not None:
                self._widen("dp_replicate", info.mesh.size(info.replicate_mesh_dim))

    def _read_layouts(self, model: nn.Module) -> None:
        """Read the meshes of a model that transformers did not distribute from its DTensors, without FSDP's.

        Ranks that share a dense weight must work on the same tokens.
        """
        data_parallel = DataParallelDims(model)
        experts = {id(p) for _, p in expert_matrices(model)}
        parameter: Any
        for parameter in model.parameters():
            if id(parameter) in experts:
                if dims := list(expert_dims(parameter, data_parallel)):
                    self._expert_ranks = ranks_along(parameter.device_mesh, dims)
                    self._sizes["ep"] = len(self._expert_ranks)
            elif dims := list(layout_dims(parameter, data_parallel)):
                self._tokens_shared_by = ranks_along(parameter.device_mesh, dims)
                self._sizes["tp"] = len(self._tokens_shared_by)

    def _widen(self, name: str, size: int) -> None:
        self._sizes[name] = max(size, self._sizes.get(name, 1))


def _exchange_name(config: Any) -> str | None:
    """Return `auto`, `all_to_all` or `all_reduce`, or None for an unknown implementation.

    DeepGEMM's Mega MoE moves the tokens inside its kernel: an all-to-all without a visible collective.
    """
    if getattr(config, "_experts_implementation", None) == "deepgemm_megamoe":
        return "all_to_all"
    name = getattr(getattr(config, "distributed_config", None), "ep_implementation", None)
    if name == "deepgemm_megamoe":
        return "all_to_all"
    return name if name in ("auto", "all_to_all", "all_reduce") else None
