"""Replacements for what vLLM's CPU build lacks for expert parallelism; all else in the tests is vLLM's.

Its kernel ignores `expert_map`, which ends in a segmentation fault. Here ids of local experts are mapped to
the rank's weights, and the others get weight 0. Its communicator lacks collectives with uneven parts, by
which data-parallel ranks exchange tokens. Here they consist of broadcasts and an all-reduce. A worker imports
this, by `worker_extension_cls`, before it loads its model.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from engine_run import OracleWorker


def obey_expert_map() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def with_local_ids(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["expert_map"] is not None:
            ids = given["expert_map"][given["topk_ids"].long()]
            given["topk_weights"] = given["topk_weights"].masked_fill(ids < 0, 0.0)
            given["topk_ids"] = ids.clamp(min=0).to(given["topk_ids"].dtype)
        return apply(**given)

    CPUUnquantizedExperts.apply = with_local_ids


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    import torch

    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    parts = [input_.new_empty((rows, *input_.shape[1:])) for rows in sizes or [len(input_)] * self.world_size]
    parts[self.rank_in_group].copy_(input_)
    for rank, part in zip(self.ranks, parts, strict=True):
        torch.distributed.broadcast(part, src=rank, group=self.cpu_group)
    return torch.cat(parts)


def reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
    import torch

    total = input_.float()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    parts = total.split(sizes or [len(total) // self.world_size] * self.world_size)
    return parts[self.rank_in_group].to(input_.dtype)


def exchange_uneven_parts() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv


obey_expert_map()
exchange_uneven_parts()


class ExpertParallelWorker(OracleWorker):
    """The mends, and the oracle."""
