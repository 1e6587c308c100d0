"""`tensorboard_trace_handler`: a profiler's trace and the routing's scalars in one folder."""

from __future__ import annotations

import glob
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_trace.data.errors import MoETraceError
from moe_trace.integrations.scalars import write_scalars
from moe_trace.read.file.folder import TRACE_SUFFIXES
from moe_trace.record.parallel.environment import rank_and_world_size
from moe_trace.record.profiler import attached_tracers


def tensorboard_trace_handler(
    dir_name: str | os.PathLike[str],
    worker_name: str | None = None,
    use_gzip: bool = False,
    *,
    first_step: int = 0,
    reduce: bool = False,
) -> Callable[[Any], None]:
    """An `on_trace_ready` that writes the merged trace and TensorBoard scalars into one folder.

    Args:
        dir_name: TensorBoard's log folder; made if it is missing.
        worker_name: unique for each process; by default `hostname_pid`, and `hostname_pid.rank3` in a
            process group. Each rank then writes a trace of its own, and its scalars into `rank3` below.
        use_gzip: write `.pt.trace.json.gz`.
        first_step: of the scalars, where the caller counts its steps otherwise than the profiler, from 0.
        reduce: read the trace once it is written, and put a small file beside it with all that a report
            needs of it: for runs of many ranks (`moe-trace reduce` does the same later).
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
        if reduce:
            _reduce_newest(Path(dir_name), worker or f"{socket.gethostname()}_{os.getpid()}")

    return handle


def _reduce_newest(folder: Path, worker: str) -> None:
    """The trace stands whatever becomes of this."""
    from moe_trace.read.reduced.workers import reduce_trace

    written = list(folder.glob(f"{glob.escape(worker)}.*.pt.trace.json*"))
    written = [file for file in written if file.name.endswith(TRACE_SUFFIXES)]
    try:
        reduce_trace(max(written, key=lambda file: file.stat().st_mtime_ns))
    except (MoETraceError, OSError, ValueError) as error:
        warnings.warn(f"the trace was written, and not reduced: {error}", stacklevel=2)
