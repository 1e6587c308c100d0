"""Parallel layout of a process of a serving engine, which neither wrappers nor tensor layouts show.

vLLM gives each process plain tensors, keeps its groups in `vllm.distributed.parallel_state`, and each MoE
layer has a `FusedMoEParallelConfig`. Both are read without importing anything from vLLM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_trace.data.schema import ExpertExchange

_GROUPS = "vllm.distributed.parallel_state"


@dataclass(frozen=True, kw_only=True)
class EngineLayout:
    """Parallel layout of one process; see `Parallel` for the fields."""

    sizes: dict[str, int]
    token_ranks: tuple[int, ...]
    expert_ranks: tuple[int, ...]
    exchange: ExpertExchange | None


def engine_layout(model: nn.Module) -> EngineLayout | None:
    """Return the layout of the model's engine, or None if no known engine runs the model."""
    groups = sys.modules.get(_GROUPS)
    found = next(_moe_layers(model), None) if groups is not None else None
    if groups is None or found is None:
        return None
    layer, config = found
    tensor = tuple(groups.get_tp_group().ranks)
    ep_ranks = tuple(groups.get_ep_group().ranks)  # data, prefill context and tensor parallel ranks together
    gathered = _is_gathered(layer, config)
    split_tokens = config.sp_size > 1 and not gathered
    this_rank = (groups.get_world_group().rank,)
    tokens_differ = config.dp_size * config.pcp_size * config.sp_size > 1
    exchange: ExpertExchange = "all_to_all" if tokens_differ and not gathered else "all_reduce"
    sizes = {"dp": config.dp_size, "tp": len(tensor), "pp": len(groups.get_pp_group().ranks)}
    if config.use_ep:
        sizes["ep"] = config.ep_size
    elif config.tp_size != len(tensor):
        sizes["etp"] = config.tp_size
    return EngineLayout(
        sizes=sizes,
        token_ranks=ep_ranks if gathered else this_rank if split_tokens else tensor,
        expert_ranks=ep_ranks if config.use_ep else (),
        exchange=exchange if config.use_ep else None,
    )


def _moe_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield (layer, configuration) pairs, first those of layers that show whether they gather tokens."""
    found = [
        (module, config)
        for module in model.modules()
        if (config := getattr(getattr(module, "moe_config", None), "moe_parallel_config", None)) is not None
    ]
    yield from sorted(found, key=lambda pair: not hasattr(pair[0], "do_naive_dispatch_combine"))


def _is_gathered(layer: nn.Module, config: Any) -> bool:
    """Return whether the tokens of all ranks are gathered before the router decides, as is done for kernels
    that do not exchange tokens themselves."""
    if getattr(layer, "do_naive_dispatch_combine", False):
        return True
    return bool(config.pcp_size > 1 and config.dp_size == 1 and not config.use_all2all_kernels)
