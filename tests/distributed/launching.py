"""Start the processes of a distributed test, and wait for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def transformers_splits_experts() -> bool:
    """Whether this transformers has the parallelism that the modes ask for (5.23 has)."""
    import transformers

    config = getattr(transformers, "DistributedConfig", None)
    return config is not None and "ep_implementation" in {field.name for field in fields(config)}


def environment(**changes: str) -> dict[str, str]:
    """Of a child: offline, on one thread, finding the package, and keeping what the parent was given."""
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), str(TESTS), *([given] if given else [])])
    values = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "6"}
    return os.environ | values | changes


@dataclass(frozen=True)
class Ranks:
    """What the processes of one run wrote down."""

    folder: Path
    world_size: int

    def notes(self, mode: str) -> list[dict[str, Any]]:
        """Of each rank."""
        files = (self.folder / f"{mode}.{rank}.json" for rank in range(self.world_size))
        return [json.loads(file.read_text()) for file in files]

    def traces(self, mode: str) -> Path:
        return self.folder / mode


def run_ranks(model: Path, out: Path, world_size: int, modes: tuple[str, ...], device: str = "cpu") -> Ranks:
    """One process per rank, through all modes; any failure shows what the processes printed."""
    command = [sys.executable, "-m", "distributed.worker", model, out, device, *modes]
    children = []
    for rank in range(world_size):
        variables = environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        children.append(
            subprocess.Popen(
                [str(part) for part in command],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [child.communicate(timeout=250)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    failed = [f"rank {i}:\n{printed[i][-3000:]}" for i, child in enumerate(children) if child.returncode]
    assert not failed, "\n".join(failed)
    return Ranks(out, world_size)


def torchrun(processes: int, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node N ...`, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*launcher, *rendezvous, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(**changes),
    )
