"""Expert parallelism in vLLM's CPU build, whose kernel does not ask `expert_map` and ends in a segmentation
fault: here ids of experts that the rank holds become those of its weights, the others get the weight 0.

A worker imports this for `worker_extension_cls` before it loads its model. All else is vLLM's own.
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


obey_expert_map()


class ExpertParallelWorker(OracleWorker):
    """The mend, and the oracle."""
