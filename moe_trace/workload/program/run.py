"""Run a program of the user under `moe-trace run`: unchanged, and watched once it imports torch.

Torch is not imported before the program imports it, since programs set variables that torch and transformers
read on import.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moe_trace.workload.config import RunConfig
from moe_trace.workload.folder import claim_folder, files_in
from moe_trace.workload.program.as_main import Program

if TYPE_CHECKING:
    from moe_trace.workload.program.watch import Watch


@dataclass(frozen=True)
class ProgramRun:
    """How a program ended, and what was recorded."""

    status: int
    """Exit status from `Program.run`."""
    out: Path
    traces: tuple[Path, ...]
    """Traces with the routing, from any profiler."""
    files: tuple[Path, ...]
    """Files in `out`."""
    own_profiler: bool
    """Whether the program started a profiler."""
    why_nothing: str
    """Reason to report if there is no trace."""


def run_program(program: Program, config: RunConfig) -> ProgramRun:
    """Run the program to its end.

    Args:
        config: `steps` are profiled after `warmup` others, unless the program starts its own profiler.

    Raises:
        UsageError: there is no such program, or it is a launcher of the processes to be watched.
        OutputError: the folder cannot be written, or holds other files.
    """
    program.check()
    leads = _rank() == 0
    earlier = claim_folder(config.out, force=config.force) if leads else []
    watches: list[Watch] = []

    def watch() -> None:
        from moe_trace.workload.program.watch import Watch

        settled = replace(config, out=_shared_folder(config.out))
        watches.append(Watch(settled, worker=_worker()))
        watches[0].start()

    finder = _TorchFinder(watch)
    finder.install()
    try:
        status = _status_of(program)
    finally:
        finder.remove()
        for started in watches:
            started.finish()
    if not watches:
        return ProgramRun(status, config.out, (), (), False, f"{program.target} did not import torch")
    watched = watches[0]
    if watched.traces and leads:
        for file in earlier:
            file.unlink(missing_ok=True)
    out = watched.config.out
    reason = _why_nothing(program, watched)
    return ProgramRun(status, out, tuple(watched.traces), files_in(out), watched.own_profiler, reason)


def _status_of(program: Program) -> int:
    """Run the program. Processes that it forked exit here: forked under a profiler, they would hang later."""
    process, status = os.getpid(), program.run()
    if os.getpid() != process:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if _launched() else 0


def _launched() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _worker() -> str | None:
    """Return a worker name with the rank, since the process group may be gone when the trace is written."""
    return f"{socket.gethostname()}_{os.getpid()}.rank{_rank()}" if _launched() else None


def has_store() -> bool:
    """Return whether torchrun started this process and its agent keeps a store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _shared_folder(folder: Path) -> Path:
    """Return rank 0's folder from the store of torchrun's agent; the process group is the program's own."""
    if not _launched() or not has_store():
        return folder
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False)
    key = f"moe_trace/out/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if _rank() == 0:
        store.set(key, str(folder))
        return folder
    return Path(store.get(key).decode())


def _why_nothing(program: Program, watch: Watch) -> str:
    if not watch.models:
        return (
            f"{program.target} called no model with MoE routers in this process; `moe-trace routers` says "
            "what would be found"
        )
    if watch.own_profiler:
        return f"{program.target} profiled by itself, and wrote no trace in which a router ran"
    return (
        f"{program.target} ended in step {watch.step} of {watch.models[0]}, counted from 0; recorded would "
        f"have been {watch.config.steps} from step {watch.config.warmup} on: choose others with --steps"
    )


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Import hook that calls `ready` when torch has been imported."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self._ready = ready

    def install(self) -> None:
        """Install the hook first, or call `ready` if torch is already imported."""
        if "torch" in sys.modules:
            self._ready()
        else:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return torch's own spec, with a loader that calls `ready` after the import."""
        if name != "torch":
            return None
        self.remove()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_notify(module: ModuleType) -> None:
                execute(module)
                loader.exec_module = execute
                self._ready()

            loader.exec_module = execute_and_notify
        return spec
