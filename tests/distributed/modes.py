"""The parallel modes that are tested: how each loads the model, and which rows of the batch a rank gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models import token_batch


def global_batch() -> dict[str, torch.Tensor]:
    """The batch of the single process. 11 tokens a row, so that slices over tensor parallelism are uneven."""
    return token_batch(batch=4, length=11)


@dataclass(frozen=True)
class Mode:
    """One way to run on several processes. `sizes` are those of transformers' DistributedConfig."""

    sizes: dict[str, Any] = field(default_factory=dict)
    wrap: str = ""
    """`ddp`, `fsdp` (torch's own `fully_shard`, without transformers), or nothing."""

    @property
    def fsdp(self) -> int:
        return int(self.sizes.get("fsdp_size", 1))

    def load(self, folder: Path, device: torch.device) -> Any:
        from transformers import OlmoeForCausalLM

        how: dict[str, Any] = {"dtype": torch.float32}
        if self.sizes:
            from transformers import DistributedConfig

            how["distributed_config"] = DistributedConfig(**self.sizes)
        model: Any = OlmoeForCausalLM.from_pretrained(folder, **how)
        if not self.sizes:
            model = model.to(device)
        if self.wrap == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif self.wrap == "fsdp":
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model.eval()

    def rows(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Ranks that split tensors have the same rows; the others each have theirs."""
        part, parts = dist.get_rank(), dist.get_world_size()
        if self.sizes:
            mesh = model._mesh_manager.get_mesh("fsdp")
            part, parts = mesh.get_local_rank(), mesh.size()
        share = len(batch["input_ids"]) // parts
        return {name: value[part * share : (part + 1) * share] for name, value in batch.items()}


MODES = {
    "ep_all_to_all": Mode({"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}),
    "ep_all_reduce": Mode({"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}),
    "ep_slices": Mode({"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}),
    "ep_auto": Mode({"tp_size": 2, "ep_size": 2}),
    "tp": Mode({"tp_size": 2}),
    "fsdp": Mode({"fsdp_size": 2}),
    "own_fsdp": Mode(wrap="fsdp"),
    "ddp": Mode(wrap="ddp"),
    "alone": Mode(),
    # In bfloat16, whose choices are not those of the single process in float32.
    "mixed": Mode(
        {
            "fsdp_size": 2,
            "ep_size": 2,
            "ep_implementation": "all_to_all",
            "fsdp_mixed_precision": True,
        }
    ),
    # On four processes.
    "efsdp": Mode({"fsdp_size": 4, "ep_size": 2, "ep_implementation": "all_to_all"}),
    "ep_wide": Mode({"fsdp_size": 2, "tp_size": 2, "ep_size": 4, "ep_implementation": "all_to_all"}),
}
FOUR_RANKS = ("efsdp", "ep_wide")
TWO_RANKS = tuple(name for name in MODES if name not in (*FOUR_RANKS, "mixed"))
