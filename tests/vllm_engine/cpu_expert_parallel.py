"""What vLLM's CPU build lacks for experts that are split over ranks; all else in those tests is vLLM's own.

Its kernel does not ask `expert_map`, and ends in a segmentation fault: here ids of experts that the rank
holds become those of its weights, the others get the weight 0. Its communicator has no collectives of uneven
parts, with which data-parallel ranks exchange tokens: here they are made of broadcasts and an all-reduce. A
worker imports this for `worker_extension_cls` before it loads its model.
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
