"""Pairs of recordings of which the truth is known: a hundred of the same thing, a hundred with one change.

Each A has two Bs: the same again, and one with a change. The recordings read other pieces of the same kind
of text (source code), as two runs of an evaluation do. The planted changes, a quarter of the pairs each:

    layer   in one layer two experts change places in the gate: those with the most and the least load
    experts an extra product inside each layer's experts, of 5 % of their floating-point operations
    kernels another implementation of the experts
    text    prose in place of source code

    python scripts/record_diff_pairs.py pairs                             # CPU, the demo model
    python scripts/record_diff_pairs.py pairs --device cuda --workers 4   # OLMoE's true shape

One worker records while the others write their files. Pairs that are in the folder already are kept.
`scripts/check_diff.py` says what `moe-trace diff` made of them, `scripts/check_imbalance.py` what the cost
of imbalance claims.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import multiprocessing
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

import moe_trace

CHANGES = ("layer", "experts", "kernels", "text")
STEPS = 10
TOKENS = 512
LAYER = 2


class Recorder:
    """The model, its texts, and how one recording is made."""

    def __init__(self, device: str, lock: Lock) -> None:
        self.device, self.lock = device, lock
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
        load = self._load()
        self.swapped = [int(load.argmax()), int(load.argmin())]

    def record(self, path: Path, seed: int, change: str | None) -> None:
        """Ten steps on pieces of text of its own."""
        rng = np.random.default_rng(seed)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        pieces = self._pieces("prose" if change == "text" else "code", rng)
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            if change is not None and change != "text":
                stack.enter_context(PLANTS[change](self))
            stack.enter_context(torch.no_grad())
            for piece in pieces[:2]:
                self.model(piece)
            prof = stack.enter_context(moe_trace.profile(self.model, activities=activities))
            for piece in pieces:
                self.model(piece)
                prof.step()
        part = path.with_name(f".{path.name}")
        prof.export_chrome_trace(str(part))
        part.rename(path)

    def _load(self) -> torch.Tensor:
        """[experts] of `LAYER`, on a piece of source code."""
        piece = self._pieces("code", np.random.default_rng(0))[0]
        with torch.no_grad():
            logits = self.model(piece, output_router_logits=True).router_logits[LAYER]
        chosen = logits.topk(self.model.config.num_experts_per_tok).indices
        return chosen.flatten().bincount(minlength=logits.shape[-1])

    def _pieces(self, kind: str, rng: np.random.Generator) -> list[torch.Tensor]:
        text = self.texts[kind]
        starts = rng.integers(0, len(text) - self.tokens, STEPS)
        raw = [
            np.frombuffer(text[start : start + self.tokens], np.uint8).astype(np.int64) for start in starts
        ]
        return [torch.from_numpy(ids)[None].to(self.device) for ids in raw]


def _random_olmoe() -> Any:
    from bench_pairs import TRUE_SHAPE
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in single precision four workers would not fit into 80 GB
    try:
        with torch.device("cuda"):
            return OlmoeForCausalLM(OlmoeConfig(**TRUE_SHAPE)).eval()
    finally:
        torch.set_default_dtype(before)


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
def _slower_experts(recorder: Recorder) -> Iterator[None]:
    """Real work, of 5 % of the experts' floating-point operations, at the end of each layer's experts."""
    removed: list[Callable[[], None]] = []
    for layer in recorder.model.model.layers:
        experts = layer.mlp.experts
        info = recorder.model.config
        rows = max(1, round(recorder.tokens * info.num_experts_per_tok * 0.05))
        wide = torch.randn(3 * info.intermediate_size, info.hidden_size, device=recorder.device)
        wide = wide.to(experts.gate_up_proj.dtype)
        extra = torch.randn(rows, info.hidden_size, device=recorder.device).to(wide.dtype)
        original = experts.forward

        def slower(*args: Any, _run: Any = original, _x: Any = extra, _w: Any = wide, **kwargs: Any) -> Any:
            torch.mm(_x, _w.t())
            return _run(*args, **kwargs)

        experts.forward = slower
        removed.append(lambda experts=experts: experts.__dict__.pop("forward"))  # type: ignore[misc]
    try:
        yield
    finally:
        for remove in removed:
            remove()


@contextmanager
def _other_kernels(recorder: Recorder) -> Iterator[None]:
    recorder.model.set_experts_implementation(recorder.other)
    try:
        yield
    finally:
        recorder.model.set_experts_implementation(recorder.usual)


PLANTS = {"layer": _swapped_experts, "experts": _slower_experts, "kernels": _other_kernels}


def _record_pairs(arguments: argparse.Namespace, worker: int, lock: Lock) -> None:
    """Every `workers`-th pair: A, the same again, and B with the change."""
    recorder = Recorder(arguments.device, lock)
    first = arguments.folder / f"warmup-{worker}.json.gz"
    recorder.record(first, 0, None)  # a process's first recording is slower
    first.unlink()
    for pair in range(worker, arguments.pairs, arguments.workers):
        change = CHANGES[pair % len(CHANGES)]
        for i, (name, planted) in enumerate((("a", None), ("b-same", None), (f"b-{change}", change))):
            path = arguments.folder / f"{pair:03d}-{name}.pt.trace.json.gz"
            if path.exists():
                continue
            began = time.monotonic()
            recorder.record(path, 1 + 3 * pair + i, planted)
            print(f"{path.name} {time.monotonic() - began:.1f} s", flush=True)
            _give_memory_back()


def _give_memory_back() -> None:
    """A recording's memory is free once it is written; glibc keeps it in the arenas of the threads that wrote
    it, some 12 MB more with each recording."""
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
        "--pairs", type=int, default=100, help="of each sort: unchanged, changed (default 100)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes (default 1; 15 GB of GPU memory each)"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    workers = [
        context.Process(target=_record_pairs, args=(arguments, worker, lock))
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
