"""One of two processes that use a model sharded by FSDP 2 as users do, bare and traced.

    python -m distributed.fsdp_use OUT_FOLDER

with RANK and WORLD_SIZE set. `OUT_FOLDER/<rank>.json` contains what was recorded and what the experts
received.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts

LAYERS, EXPERTS, TOKENS = 2, 8, 4

Act = Callable[[Any, dict[str, torch.Tensor]], list[torch.Tensor]]


@torch.no_grad()
def generate(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)]


@torch.no_grad()
def inner_model(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """`model.model` holds the layers and is no unit of FSDP; twice, with the whole model in between."""
    inner, whole = model.model(**batch).last_hidden_state, model(**batch).logits
    return [inner, whole, model.model(**batch).last_hidden_state]


@torch.no_grad()
def padded(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    mask = torch.ones_like(batch["input_ids"])
    mask[0, : 1 + dist.get_rank()] = 0  # another number on each rank
    return [model(input_ids=batch["input_ids"], attention_mask=mask).logits]


def train(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A step with its layers checkpointed: the loss, and this rank's shards of the gradients."""
    model.train()
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    model.eval()
    return [loss.detach(), *(p.grad.to_local().clone() for p in model.parameters() if p.grad is not None)]


ACTS: tuple[Act, ...] = (generate, inner_model, padded, train)


def main(out: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=200),
    )
    model = tiny_olmoe(layers=LAYERS, experts=EXPERTS).eval()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = dist.init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = token_batch(2, 5, seed=rank)
    with torch.no_grad():
        model(**batch)  # what FSDP sets up once
    notes = {act.__name__: use(model, act, batch) for act in ACTS}
    Path(out, f"{rank}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def use(model: Any, act: Act, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    bare = act(model, batch)
    with moe_trace.MoETracer(model) as tracer, watch_experts(model) as received:
        traced = act(model, batch)
    again = act(model, batch)
    lost = tracer.recording().lost
    return {
        "same": [len(bare) == len(other) and all(map(torch.equal, bare, other)) for other in (traced, again)],
        "outputs": len(bare),
        "received": [(call.layer, call.assignments(EXPERTS)) for call in received],
        "samples": [
            {
                "layer": int(sample.name.split(".")[2]),
                "call": sample.call,
                "step": sample.step,
                "stage": sample.stage,
                "phase": sample.phase,
                "assignments": sample.assignments.tolist(),
                "tokens": sample.tokens,
                "padding": sample.padding_assignments,
            }
            for sample in tracer.samples()
        ],
        "seen": dict(lost.calls_seen),
        "lost": {name: dict(reasons) for name, reasons in lost.calls.items()},
        "experts_without_router": lost.experts_without_router,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
