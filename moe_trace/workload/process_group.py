"""The processes of a `moe-trace run` under torchrun: joining, agreeing, and waiting for each other's files.

Agreement uses the rendezvous' key-value store, which also works when a process has died; no collective is
added to the recorded steps.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from moe_trace.data.errors import MoETraceError, UsageError

_POLL_S = 0.05
_STOPPING_S = 1.0
_COLLECTIVE_S = 7200.0  # loading a large model may take tens of minutes, and differ between processes
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_runs = itertools.count()  # a process may do several runs, each with its own keys in the store


class RankFailed(MoETraceError):
    """A process of the run died, failed, was late, or left no file. Files of the others are kept."""

    exit_code = 8


class LeaderFailed(MoETraceError):
    """Rank 0, or the process that draws the weights, failed or did not answer; this process ends silently."""

    exit_code = 8


class StopSignal:
    """Handler of torchrun's SIGTERM in rank 0: when a process dies, torchrun stops the others.

    It raises an error that ends the run, so that the trace is still written and rank 0 can report which
    process died. After `only_note` the signal only shortens the wait for others.
    """

    def __init__(self) -> None:
        self.asked = False
        self._raises = True

    def __call__(self, number: int, frame: Any) -> None:
        self.asked = True
        if self._raises:
            self._raises = False
            raise RankFailed("torchrun stopped this process, because another one ended")

    def only_note(self) -> None:
        """Stop raising errors on the signal."""
        self._raises = False


@dataclass(frozen=True)
class Worker:
    """This process among those of the run; a run without torchrun has one worker."""

    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    world_size: int = 1
    store: Any = field(default=None, repr=False)
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def is_rank0(self) -> bool:
        """Whether this process draws, prints and reports for the run."""
        return self.rank == 0

    def publish(self, what: str, value: object) -> None:
        """Publish a JSON value for the others under this rank's key."""
        if self.store is not None:
            self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def lookup(self, what: str, rank: int) -> Any:
        """Return the value that a rank has published, or None if it has not yet."""
        key = f"{what}/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def told(self, what: str, rank: int) -> Any:
        """Return the value as `lookup` does, or `{"failed": why}` for a rank that has failed."""
        failed = self.lookup("failed", rank)
        return self.lookup(what, rank) if failed is None else {"failed": failed}

    def wait_for_leader(self, what: str, timeout_s: float) -> None:
        """Wait until rank 0 has published `what`.

        Raises:
            LeaderFailed: rank 0 failed, or did not publish it in time.
        """
        answer = self.wait(lambda: self.lookup(what, 0), timeout_s)
        if answer is None or answer.get("failed"):
            raise LeaderFailed(f"rank 0 {'failed' if answer else f'did not answer in {timeout_s:g} s'}")

    def wait(self, ask: Callable[[], Any], timeout_s: float) -> Any:
        """Return the first answer that is not None, or None at the timeout or shortly after a stop signal."""
        deadline = time.monotonic() + timeout_s
        while True:
            answer = ask()
            if self.stop.asked:
                deadline = min(deadline, time.monotonic() + _STOPPING_S)
            if answer is not None or time.monotonic() >= deadline:
                return answer
            time.sleep(_POLL_S)


def is_launched() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in _VARIABLES)


@contextmanager
def joined(device_type: str, expected: int | None) -> Iterator[Worker]:
    """Join the process group of torchrun, and leave it at the end.

    Args:
        device_type: `cuda` uses NCCL and the GPU of the local rank, `cpu` uses gloo.
        expected: required number of processes, the product of the given sizes; None for any number.

    Raises:
        UsageError: the process was not started by torchrun, or the number of processes differs.
    """
    if not is_launched():
        raise UsageError(
            f"this run is split over {expected or 'several'} processes and was started as one; start it with "
            f"`torchrun --nproc-per-node {expected or 'N'} -m moe_trace run ...`"
        )
    rank, local_rank, world_size = (int(os.environ[name]) for name in _VARIABLES[:3])
    if expected is not None and world_size != expected:
        raise UsageError(
            f"the sizes given need {expected} processes, and torchrun started {world_size}; change "
            f"--nproc-per-node, or --fsdp, --tp and --ep (fsdp x tp = processes; ep splits the same ones)"
        )
    gpu = _take_gpu(rank, local_rank) if device_type == "cuda" else None
    number = next(_runs)
    store, _, _ = next(rendezvous("env://"))
    distributed.init_process_group(
        backend="gloo" if gpu is None else "nccl",
        store=PrefixStore(f"group{number}", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_COLLECTIVE_S),
        device_id=gpu,
    )
    run_store = PrefixStore(f"moe_trace{number}", store)
    worker = Worker(rank, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world_size, run_store)
    before = signal.signal(signal.SIGTERM, worker.stop if rank == 0 else signal.SIG_DFL)
    try:
        yield worker
    finally:
        signal.signal(signal.SIGTERM, before)
    distributed.destroy_process_group()  # skipped after a failure, where it might wait for a dead process


def _take_gpu(rank: int, local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {rank} needs GPU {local_rank}, and torch finds {torch.cuda.device_count()}: start one "
            "process per GPU (--nproc-per-node), or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def missing_files(worker: Worker, folder: Path, timeout_s: float) -> list[str]:
    """Wait for the files of the other ranks; return a sentence for each rank without a file in the folder.

    Args:
        timeout_s: timeout for all of them together.
    """
    deadline = time.monotonic() + timeout_s
    problems = []
    for rank in range(1, worker.world_size):
        remaining_s = max(0.0, deadline - time.monotonic())
        answer = worker.wait(functools.partial(worker.told, "trace", rank), remaining_s)
        if answer is None:
            problems.append(
                f"rank {rank} has written no trace within {timeout_s:g} s of rank 0 (it died, or is late)"
            )
        elif "failed" in answer:
            problems.append(f"rank {rank} failed: {answer['failed']}")
        elif not (folder / answer["file"]).exists():
            problems.append(
                f"rank {rank} wrote {answer['file']} on {answer['host']}, which is not in {folder} on "
                f"{socket.gethostname()}: give --out a folder that all machines share"
            )
    return problems
