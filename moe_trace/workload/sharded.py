"""Load a model split over processes, by transformers' own parallelism."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moe_trace.data.errors import UsageError
from moe_trace.demo import demo_path
from moe_trace.workload.config import Mode, Split
from moe_trace.workload.models import load_model, load_tokenizer
from moe_trace.workload.process_group import LeaderFailed, Worker

_DRAWING_S, _READING_S = 1800.0, 600.0  # large models take minutes


def require_support(split: Split, device: torch.device) -> None:
    """Check early that this torch and transformers support the split.

    Raises:
        UsageError: a requirement is missing; the message names it.
    """
    if not distributed.is_available():
        raise UsageError("this torch is built without torch.distributed; a run cannot be split with it")
    if not split.needs_transformers:
        return
    try:
        import accelerate  # noqa: F401
        from transformers import DistributedConfig
    except ImportError as error:
        raise UsageError(
            f"--fsdp, --tp and --ep need transformers with DistributedConfig and accelerate ({error}): "
            "pip install 'moe_trace[parallel]'"
        ) from error
    known = {field.name for field in fields(DistributedConfig)}
    missing = {"fsdp_size", "tp_size", "ep_size", "ep_implementation"} - known
    if missing:
        import transformers

        raise UsageError(
            f"transformers {transformers.__version__} has a DistributedConfig without "
            f"{', '.join(sorted(missing))}; --fsdp, --tp and --ep need 5.23 or later"
        )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != device.type:
        raise UsageError(
            f"--device {device.type} with --fsdp, --tp or --ep: transformers splits over the accelerator "
            f"that torch finds ({accelerator.type}); hide it (CUDA_VISIBLE_DEVICES=) or leave --device out"
        )


def wrapped(model: nn.Module, split: Split, mode: Mode) -> nn.Module:
    """Wrap the model in DistributedDataParallel for `--ddp`, except to generate: it has no `generate`."""
    if not split.ddp or mode == "generate":
        return model
    return nn.parallel.DistributedDataParallel(model)


def load_split_model(
    source: str,
    split: Split,
    worker: Worker,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    random_weights: bool,
    **changed: Any,
) -> tuple[nn.Module, Any]:
    """Return this process's part of the model (all of it with `--ddp`), in eval mode, and its tokenizer.

    `changed` are `top_k` and `experts_implementation` of `load_model`. Random weights are the same on all
    processes, and the same as those of a run that is not split.

    Raises:
        ModelError: the model cannot be loaded, or cannot be split like that.
    """
    if not split.needs_transformers:
        return load_model(source, device=device, dtype=dtype, random_weights=random_weights, **changed)
    if not random_weights:
        return load_model(source, device=device, dtype=dtype, distributed_config=_config(split), **changed)
    with _random_weights_on_disk(source, worker, dtype) as folder:
        config = _config(split)
        model, _ = load_model(str(folder), device=device, dtype=dtype, distributed_config=config, **changed)
    origin = str(demo_path()) if source == "demo" else source
    model.config.name_or_path = origin  # type: ignore[union-attr]
    return model, load_tokenizer(origin)


def _config(split: Split) -> Any:
    from transformers import DistributedConfig

    try:
        return DistributedConfig(
            fsdp_size=split.fsdp,
            tp_size=split.tp,
            ep_size=split.ep,
            ep_implementation=split.ep_implementation,
        )
    except ValueError as error:
        raise UsageError(f"--fsdp {split.fsdp} --tp {split.tp} --ep {split.ep}: {error}") from error


@contextmanager
def _random_weights_on_disk(source: str, worker: Worker, dtype: torch.dtype | None) -> Iterator[Path]:
    """Save weights drawn by one process per machine, since only `from_pretrained` can split a model.

    The folder is deleted when all processes of the machine have read it, or failed to.
    """
    if worker.local_rank != 0:
        maker = worker.rank - worker.local_rank
        answer = worker.wait(partial(worker.told, "weights", maker), _DRAWING_S)
        if answer is None or "failed" in answer:
            raise LeaderFailed(f"rank {maker} could not draw the weights")
        yield Path(answer["folder"])
        worker.publish("read", {})
        return
    with tempfile.TemporaryDirectory(prefix="moe_trace-weights-") as folder:
        model, _ = load_model(source, device="cpu", dtype=dtype, random_weights=True)
        model.save_pretrained(folder)  # type: ignore[operator]
        del model
        worker.publish("weights", {"folder": folder})
        try:
            yield Path(folder)
        finally:
            for rank in range(worker.rank + 1, worker.rank + worker.local_world_size):
                worker.wait(partial(worker.told, "read", rank), _READING_S)


def rows_of_this_process(model: nn.Module, inputs: dict[str, Tensor], worker: Worker) -> dict[str, Tensor]:
    """Return this process's rows of the batch: processes that split a model's tensors share their rows.

    Raises:
        UsageError: the rows cannot be divided evenly.
    """
    part, parts = worker.rank, worker.world_size
    manager = getattr(model, "_mesh_manager", None)
    if manager is not None:
        mesh = manager.get_mesh("fsdp")
        part, parts = mesh.get_local_rank(), mesh.size()
    rows = len(inputs["input_ids"])
    if rows % parts:
        raise UsageError(f"a batch of {rows} cannot be shared by {parts} processes evenly; set --batch")
    share = rows // parts
    return {name: value[part * share : (part + 1) * share] for name, value in inputs.items()}
