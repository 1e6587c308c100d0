"""`tensorboard_trace_handler`: a profiler's trace and the routing scalars in one folder."""

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
    """Return an `on_trace_ready` that writes the merged trace and TensorBoard scalars to one folder.

    Args:
        dir_name: TensorBoard's log folder; created if missing.
        worker_name: unique name of each process; by default `hostname_pid`, and `hostname_pid.rank3` in a
            process group. Each rank then writes its own trace, and its scalars to the subfolder `rank3`.
        use_gzip: write `.pt.trace.json.gz`.
        first_step: first step of the scalars, if the caller does not count from 0 as the profiler does.
        reduce: after writing the trace, also write a small file next to it with everything a report needs:
            for runs with many ranks (`moe-trace reduce` does the same later).
    """

    def handle(prof: Any) -> None:
        # The process group may be created after the handler.
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
    """Reduce the newest trace. It is kept even if this fails."""
    from moe_trace.read.reduced.workers import reduce_trace

    written = list(folder.glob(f"{glob.escape(worker)}.*.pt.trace.json*"))
    written = [file for file in written if file.name.endswith(TRACE_SUFFIXES)]
    try:
        reduce_trace(max(written, key=lambda file: file.stat().st_mtime_ns))
    except (MoETraceError, OSError, ValueError) as error:
        warnings.warn(f"the trace was written, and not reduced: {error}", stacklevel=2)
