"""One process of a distributed test, which runs a model in the requested modes and writes its observations.

    python -m distributed.worker MODEL_FOLDER OUT_FOLDER DEVICE MODE...

with RANK, LOCAL_RANK and WORLD_SIZE set, as torchrun does. The real input of the experts' all-to-all is
recorded by wrapping transformers' function, only here. The notes are written to
`OUT_FOLDER/<mode>.<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

import moe_trace
from distributed.modes import MODES, Mode, global_batch
from moe_trace.data.schema import RoutingSample

COLLECTIVES = ("gloo:", "nccl:", "c10d::", "_c10d_functional::", "record_param_comms")


def main(model_folder: str, out: str, device_type: str, *modes: str) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{out}/store",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=100),
    )
    for name in modes:
        notes = run_mode(MODES[name], Path(model_folder), device, Path(out) / name)
        (Path(out) / f"{name}.{rank}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def run_mode(mode: Mode, folder: Path, device: torch.device, traces: Path) -> dict[str, Any]:
    """Inference bare and traced, then a training step bare and traced."""
    model = mode.load(folder, device)
    batch = {name: value.to(device) for name, value in mode.rows(model, global_batch()).items()}
    with torch.no_grad():
        model(**batch)  # FSDP and DDP start with collectives that they do not repeat
    bare: dict[str, Any] = {}
    with torch.no_grad(), counted(bare), plain_profile(bare):
        expected = model(**batch).logits
    traced: dict[str, Any] = {}
    with watched_splits() as splits, torch.no_grad(), counted(traced):
        with profile(model, traces) as prof:
            seen = model(**batch).logits
        tracer = prof.tracer
        recording = tracer.recording()
    traced["events"] = collective_events(prof)
    notes: dict[str, Any] = {
        "parallel": None if recording.parallel is None else vars(recording.parallel),
        "rank": recording.rank,
        "world_size": recording.world_size,
        "model": recording.model,
        "routers": [vars(router) for router in recording.routers],
        "inference": {
            "samples": plain(recording.samples),
            "splits": splits,
            "logits_equal": torch.equal(expected, seen),
            "logits": full(seen).tolist(),
            "bare": bare,
            "traced": traced,
        },
        "traces": sorted(file.name for file in traces.glob("*.gz")),
    }
    notes["training"] = train(model, batch)
    return notes


def train(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Two equal training steps with gradient checkpointing and no update between them."""
    model.train()
    getattr(model, "module", model).gradient_checkpointing_enable()
    for _ in range(2):
        training_step(model, batch)  # DDP sorts its buckets after the first one
    bare: dict[str, Any] = {}
    with counted(bare), plain_profile(bare):
        expected = training_step(model, batch)
    traced: dict[str, Any] = {}
    with watched_splits() as splits, counted(traced):
        with moe_trace.profile(model, activities=[ProfilerActivity.CPU]) as prof:
            loss = training_step(model, batch)
        recording = prof.tracer.recording()
    traced["events"] = collective_events(prof)
    return {
        "samples": plain(recording.samples),
        "exchange": recording.parallel and recording.parallel.expert_exchange,
        "splits": splits,
        "loss": loss[0],
        "equal": expected == loss,
        "bare": bare,
        "traced": traced,
    }


def training_step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, list[float]]:
    """(loss, sum of the gradients of each parameter)."""
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    sums = [local(p.grad).double().sum().item() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.item(), sums


def profile(model: Any, traces: Path) -> moe_trace.profile:
    return moe_trace.profile(
        model,
        activities=[ProfilerActivity.CPU],
        record_shapes=True,  # gloo's all-to-alls have their split sizes only then
        on_trace_ready=moe_trace.tensorboard_trace_handler(traces, use_gzip=True),
    )


@contextmanager
def plain_profile(notes: dict[str, Any]) -> Iterator[None]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as prof:
        yield
    notes["events"] = collective_events(prof)


def collective_events(prof: torch.profiler.profile) -> dict[str, int]:
    names = (event.name for event in prof.events() if event.name.startswith(COLLECTIVES))
    return dict(Counter(names))


@contextmanager
def counted(notes: dict[str, Any]) -> Iterator[None]:
    """Notes how many collectives each process group was given."""
    groups = list(dist.distributed_c10d._world.pg_map)
    before = [group._get_sequence_number_for_group() for group in groups]
    yield
    after = [group._get_sequence_number_for_group() for group in groups]
    notes["collectives"] = [b - a for a, b in zip(before, after, strict=True)]


@contextmanager
def watched_splits() -> Iterator[list[dict[str, Any]]]:
    """The split sizes of every all-to-all of hidden states, as the function got them."""
    try:
        from transformers.distributed import expert_parallel
    except ImportError:
        yield []
        return
    original = expert_parallel.all_to_all_single_autograd
    seen: list[dict[str, Any]] = []

    def watched(tensor: torch.Tensor, received: list[int], sent: list[int], group: Any) -> torch.Tensor:
        assert tensor.shape[0] == sum(sent)
        seen.append(
            {
                "sent": list(sent),
                "received": list(received),
                "bytes": tensor.numel() * tensor.element_size(),
                "recompute": torch._C._current_graph_task_id() != -1,
            }
        )
        return original(tensor, received, sent, group)

    expert_parallel.all_to_all_single_autograd = watched
    try:
        yield seen
    finally:
        expert_parallel.all_to_all_single_autograd = original


def plain(samples: tuple[RoutingSample, ...]) -> list[dict[str, Any]]:
    return [
        {
            "site": s.site,
            "phase": s.phase,
            "stage": s.stage,
            "tokens": s.tokens,
            "top_k": s.top_k,
            "skipped": s.skipped,
            "assignments": s.assignments.tolist(),
            "dispatched": None if s.dispatched is None else s.dispatched.tolist(),
            "slot_bytes": s.slot_bytes,
        }
        for s in samples
    ]


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main(*sys.argv[1:])
