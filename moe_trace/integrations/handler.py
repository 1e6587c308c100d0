"""`tensorboard_trace_handler`: a profiler's trace and the routing's scalars in one folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_trace.integrations.scalars import write_scalars
from moe_trace.record.parallel.environment import rank_and_world_size
from moe_trace.record.profiler import attached_tracers


def tensorboard_trace_handler(
    dir_name: str | os.PathLike[str],
    worker_name: str | None = None,
    use_gzip: bool = False,
    *,
    first_step: int = 0,
) -> Callable[[Any], None]:
    """An `on_trace_ready` that writes the merged trace and TensorBoard scalars into one folder.

    Args:
        dir_name: TensorBoard's log folder; made if it is missing.
        worker_name: unique for each process; by default `hostname_pid`, and `hostname_pid.rank3` in a
            process group. Each rank then writes a trace of its own, and its scalars into `rank3` below.
        use_gzip: write `.pt.trace.json.gz`.
        first_step: of the scalars, where the caller counts its steps otherwise than the profiler, from 0.
    """

    def handle(prof: Any) -> None:
        # Only now: the process group may be younger than the handler.
        rank, world_size = rank_and_world_size()
        worker, scalars = worker_name, Path(dir_name)
        if world_size > 1:
            worker = worker_name or f"{socket.gethostname()}_{os.getpid()}.rank{rank}"
            scalars /= f"rank{rank}"
        torch.profiler.tensorboard_trace_handler(str(dir_name), worker, use_gzip)(prof)
        for tracer in attached_tracers(prof):
            write_scalars(scalars, tracer.exported_samples, first_step=first_step)

    return handle
