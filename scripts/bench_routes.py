"""Measure time and memory of the analyses of routes: a million tokens, OLMoE-1B-7B's shape.

The routes are drawn at random: experts follow Zipf's law, in a different order in each layer, and half of a
token's experts are those of the previous token. Each command reads the file in a separate process, whose wall
time, CPU time and peak memory (`getrusage`) are measured.

    python scripts/bench_routes.py --tokens 1000000 --layers 16 --experts 64 --top-k 8
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.routes.columns import RecordedRoutes, id_type

LENGTH = 2048
CHUNK = 1 << 15


def drawn(tokens: int, layers: int, experts: int, top_k: int, *, seed: int) -> RecordedRoutes:
    """Draw the routes of sequences of `LENGTH` tokens, decoded one after the other."""
    random = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, top_k), id_type(experts))
    for layer in range(layers):
        popularity = random.permutation(1 / (np.arange(experts) + 4.0) ** 0.7)
        for start in range(0, tokens, CHUNK):
            part = ids[start : start + CHUNK, layer]
            # The largest k after adding Gumbel noise are k different experts, drawn by popularity. Half of
            # the experts keep their noise for the next token.
            noise = random.gumbel(size=(len(part), experts))
            stays = random.random(noise.shape) < 0.5
            stays[0] = False
            at = np.maximum.accumulate(np.where(stays, 0, np.arange(len(part))[:, None]), axis=0)
            noise = np.take_along_axis(noise, at, axis=0)
            part[:] = np.argpartition(-(noise + np.log(popularity)), top_k - 1, axis=1)[:, :top_k]
    rows = np.arange(tokens)
    return RecordedRoutes(
        expert_ids=ids,
        layers=tuple(f"model.layers.{layer}.mlp.gate" for layer in range(layers)),
        num_experts=(experts,) * layers,
        top_k=(top_k,) * layers,
        padding=np.zeros(tokens, np.bool_),
        step=np.zeros(tokens, np.int64),
        forward=rows.astype(np.int64),
        sequence=np.zeros(tokens, np.int32),
        position=(rows % LENGTH).astype(np.int32),
        stage_codes=np.full(tokens, STAGES.index("decode"), np.uint8),
        token_ids=np.minimum(random.zipf(1.2, tokens), 50_000).astype(np.int32),
    )


def measured(command: list[str]) -> tuple[float, float, float, int]:
    """Run a process and return its wall and CPU seconds, peak MiB and exit status."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-m", "moe_trace", *command])
    _, status, usage = os.wait4(child, 0)
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def main() -> None:
    """Draw, measure, print a table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, value in (("--tokens", 1_000_000), ("--layers", 16), ("--experts", 64), ("--top-k", 8)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="keep the file in this folder (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (arguments.folder or Path(temporary)) / "bench.routes.npz"
        if not path.exists():
            size = (arguments.tokens, arguments.layers, arguments.experts, arguments.top_k)
            drawn(*size, seed=arguments.seed).save(path)
        print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print(f"file: {path.stat().st_size / 2**20:.0f} MiB")
        commands = {
            "study": ["routes", "study", str(path)],
            "cache, all policies": ["routes", "cache", str(path), "--experts-in-memory", "8,16,32"],
        }
        for name, command in commands.items():
            seconds, cpu, mebibytes, code = measured(command)
            failed = f"  exit {code}" if code else ""
            print(f"{name:24} {seconds:7.1f} s {cpu:7.1f} s CPU {mebibytes:8.0f} MiB{failed}")


if __name__ == "__main__":
    main()
