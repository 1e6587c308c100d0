"""Record pairs with a known difference: a hundred without a change, a hundred with one change.

Each A has two Bs: one without and one with a change. The recordings read different pieces of the same kind of
text (source code), like two runs of an evaluation. Each of these changes is made in a quarter of the pairs:

    layer   the busiest and the least busy experts of a layer are swapped in its gate (one of each; on a GPU,
            where random weights load all experts alike, as many as top-k)
    experts 5 % more hidden units in each expert, with weight 0
    kernels another implementation of the experts
    text    prose instead of source code

    python scripts/record_diff_pairs.py pairs --workers 2                   # CPU, the demo model
    python scripts/record_diff_pairs.py pairs --device cuda --seconds 400   # OLMoE's true shape, fewer layers

Simultaneous recordings would disturb each other's times. On a CPU each worker has its own cores. On a GPU
there is one worker, and other processes merge and compress its output. Existing pairs in the folder are kept.
`scripts/check_diff.py` evaluates `moe-trace diff` on them, and `scripts/check_imbalance.py` the cost of
imbalance.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import multiprocessing
import os
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity

import moe_trace
from moe_trace.data.schema import Recording
from moe_trace.timeline.merge import compress

CHANGES = ("layer", "experts", "kernels", "text")
STEPS = 10
TOKENS = 512
LAYER = 2
GPU_LAYERS = 6
FINISHERS = 8


class Recorder:
    """The model, its texts, and a method that makes a recording."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self.model = _random_olmoe()
            self.usual, self.other = "grouped_mm", "eager"
        else:
            from moe_trace.demo import load_demo_model

            self.model, _ = load_demo_model()
            self.usual, self.other = "eager", "grouped_mm"
        self.tokens = 4 * TOKENS if device == "cuda" else TOKENS
        self.model.set_experts_implementation(self.usual)
        self.texts = {"code": _source_code(), "prose": _prose()}
        order = self._load().argsort().tolist()
        number = self.model.config.num_experts_per_tok if device == "cuda" else 1
        self.swapped = [*order[:number], *order[-number:]]

    def record(self, path: Path, seed: int, change: str | None) -> Recording:
        """Record ten steps on separate pieces of text, and write the profiler's unmerged trace to `path`."""
        rng = np.random.default_rng(seed)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        pieces = self._pieces("prose" if change == "text" else "code", rng)
        with ExitStack() as stack:
            if change is not None and change != "text":
                stack.enter_context(PLANTS[change](self))
            stack.enter_context(torch.no_grad())
            for piece in pieces[:2]:
                self.model(piece)
            prof = stack.enter_context(moe_trace.profile(self.model, activities=activities))
            for piece in pieces:
                self.model(piece)
                prof.step()
        torch.profiler.profile.export_chrome_trace(prof, str(path))  # ours would merge here
        return prof.tracer.recording()

    def _pieces(self, kind: str, rng: np.random.Generator) -> list[torch.Tensor]:
        text = self.texts[kind]
        starts = rng.integers(0, len(text) - self.tokens, STEPS)
        raw = [
            np.frombuffer(text[start : start + self.tokens], np.uint8).astype(np.int64) for start in starts
        ]
        return [torch.from_numpy(ids)[None].to(self.device) for ids in raw]

    def _load(self) -> torch.Tensor:
        """Return assignments per expert, [experts], in `LAYER` on a piece of source code."""
        piece = self._pieces("code", np.random.default_rng(0))[0]
        with torch.no_grad():
            logits = self.model(piece, output_router_logits=True).router_logits[LAYER]
        chosen = logits.topk(self.model.config.num_experts_per_tok).indices
        return chosen.flatten().bincount(minlength=logits.shape[-1])


def _random_olmoe() -> Any:
    from bench_pairs import TRUE_SHAPE
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = OlmoeForCausalLM(OlmoeConfig(**TRUE_SHAPE | {"num_hidden_layers": GPU_LAYERS}))
    return model.to(torch.bfloat16).eval()


def _source_code() -> bytes:
    import asyncio.base_events
    import email.message
    import subprocess
    import tarfile
    import typing

    modules = (argparse, asyncio.base_events, email.message, inspect, subprocess, tarfile, textwrap, typing)
    return "".join(map(inspect.getsource, modules)).encode("ascii", "ignore")


def _prose() -> bytes:
    from pydoc_data.topics import topics

    return "".join(topics.values()).encode("ascii", "ignore")


@contextmanager
def _swapped_experts(recorder: Recorder) -> Iterator[None]:
    weight = recorder.model.model.layers[LAYER].mlp.gate.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[recorder.swapped] = before[recorder.swapped[::-1]]
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextmanager
def _wider_experts(recorder: Recorder) -> Iterator[None]:
    """Give experts 5 % more hidden units with weight 0: more work for the same result."""
    experts = [layer.mlp.experts for layer in recorder.model.model.layers]
    before = [(one.gate_up_proj.data, one.down_proj.data) for one in experts]
    aligned = 16 // before[0][0].element_size()  # required by grouped products
    wide = round(1.05 * recorder.model.config.intermediate_size / aligned) * aligned
    more = wide - recorder.model.config.intermediate_size
    for one, (gate_up, down) in zip(experts, before, strict=True):
        halves = [functional.pad(half, (0, 0, 0, more)) for half in gate_up.chunk(2, dim=1)]
        one.gate_up_proj.data = torch.cat(halves, dim=1)
        one.down_proj.data = functional.pad(down, (0, more))
    try:
        yield
    finally:
        for one, (gate_up, down) in zip(experts, before, strict=True):
            one.gate_up_proj.data, one.down_proj.data = gate_up, down


@contextmanager
def _other_kernels(recorder: Recorder) -> Iterator[None]:
    recorder.model.set_experts_implementation(recorder.other)
    try:
        yield
    finally:
        recorder.model.set_experts_implementation(recorder.usual)


PLANTS = {"layer": _swapped_experts, "experts": _wider_experts, "kernels": _other_kernels}


def _record_pairs(arguments: argparse.Namespace, worker: int, until: float) -> None:
    """Record every `workers`-th pair: A, B without a change, and B with the change."""
    cores = sorted(os.sched_getaffinity(0))
    if arguments.device == "cpu":
        share = len(cores) // arguments.workers
        os.sched_setaffinity(0, cores[worker * share : (worker + 1) * share])
        torch.set_num_threads(share)
    recorder = Recorder(arguments.device)
    first = arguments.folder / f".first-{worker}.json"
    recorder.record(first, 0, None)  # the first recording of a process is slower
    first.unlink()
    with ProcessPoolExecutor(FINISHERS, multiprocessing.get_context("spawn")) as pool:
        running: list[Future[None]] = []
        for pair in range(worker, arguments.pairs, arguments.workers):
            if time.monotonic() > until:
                break
            running += _record_pair(arguments, recorder, pair, pool)
        for one in running:
            one.result()


def _record_pair(
    arguments: argparse.Namespace, recorder: Recorder, pair: int, pool: ProcessPoolExecutor
) -> Iterator[Future[None]]:
    change = CHANGES[pair % len(CHANGES)]
    for i, (name, planted) in enumerate((("a", None), ("b-same", None), (f"b-{change}", change))):
        path = arguments.folder / f"{pair:03d}-{name}.pt.trace.json.gz"
        if path.exists():
            continue
        began = time.monotonic()
        raw = path.with_name(f".{path.name.removesuffix('.gz')}")
        recording = recorder.record(raw, 1 + 3 * pair + i, planted)
        print(f"{path.name} {time.monotonic() - began:.1f} s", flush=True)
        _give_memory_back()
        if arguments.device == "cpu":
            _finish(raw, recording, path)
        else:
            yield pool.submit(_finish, raw, recording, path)


def _finish(raw: Path, recording: Recording, path: Path) -> None:
    moe_trace.merge_into(raw, recording)
    part = raw.with_suffix(".part")
    compress(raw, part)
    part.rename(path)
    raw.unlink()


def _give_memory_back() -> None:
    """Return freed memory to the system. glibc would keep that of a written recording in the arenas of the
    threads that wrote it, about 12 MB more with each recording."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--pairs",
        type=int,
        default=100,
        help="number of pairs of each kind, unchanged and changed (default 100)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--workers", type=int, default=1, help="number of simultaneous recordings on a CPU (default 1)"
    )
    parser.add_argument("--seconds", type=float, default=1e6, help="begin no pair after this time")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.workers > 1:
        parser.error("one GPU records one pair at a time")
    until = time.monotonic() + arguments.seconds
    arguments.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_record_pairs, args=(arguments, worker, until))
        for worker in range(arguments.workers)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        raise SystemExit("a worker failed; run again to record what is missing")


if __name__ == "__main__":
    main()
