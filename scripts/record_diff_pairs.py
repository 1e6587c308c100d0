"""Pairs of recordings of which the truth is known: a hundred of the same thing, a hundred with one change.

The two recordings of a pair read other pieces of the same kind of text (source code), as two runs of an
evaluation do. The planted changes, a quarter of the pairs each:

    layer   in one layer two experts change places in the gate: the one with most load, and one with none
    experts an extra product inside each layer's experts, of 5 % of their floating-point operations
    kernels another implementation of the experts
    text    prose in place of source code

    python scripts/record_diff_pairs.py pairs                    # CPU, the demo model
    python scripts/record_diff_pairs.py pairs --device cuda      # OLMoE's true shape, random weights

`scripts/check_diff.py` says what `moe-trace diff` made of them.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            from bench_pairs import TRUE_SHAPE
            from transformers import OlmoeConfig, OlmoeForCausalLM

            torch.manual_seed(0)
            with torch.device(device):
                self.model = OlmoeForCausalLM(OlmoeConfig(**TRUE_SHAPE)).to(torch.bfloat16).eval()
            self.usual, self.other = "grouped_mm", "eager"
        else:
            from moe_trace.demo import load_demo_model

            self.model, _ = load_demo_model()
            self.usual, self.other = "eager", "grouped_mm"
        self.tokens = 4 * TOKENS if device == "cuda" else TOKENS
        self.model.set_experts_implementation(self.usual)
        self.texts = {"code": _source_code(), "prose": _prose()}

    def record(self, path: Path, seed: int, change: str | None) -> None:
        """Ten steps on pieces of text of its own."""
        rng = np.random.default_rng(seed)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with ExitStack() as stack:
            if change is not None and change != "text":
                stack.enter_context(PLANTS[change](self))
            stack.enter_context(torch.no_grad())
            pieces = self._pieces("prose" if change == "text" else "code", rng)
            for piece in pieces[:2]:
                self.model(piece)
            prof = stack.enter_context(moe_trace.profile(self.model, activities=activities))
            for piece in pieces:
                self.model(piece)
                prof.step()
        prof.export_chrome_trace(str(path))

    def _pieces(self, kind: str, rng: np.random.Generator) -> list[torch.Tensor]:
        text = self.texts[kind]
        starts = rng.integers(0, len(text) - self.tokens, STEPS)
        raw = [
            np.frombuffer(text[start : start + self.tokens], np.uint8).astype(np.int64) for start in starts
        ]
        return [torch.from_numpy(ids)[None].to(self.device) for ids in raw]


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
        weight[[7, 8]] = before[[8, 7]]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--pairs", type=int, default=100, help="of each sort: unchanged, changed (default 100)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    recorder = Recorder(arguments.device)
    seed = 0
    for pair in range(arguments.pairs):
        for sort, change in (("same", None), (CHANGES[pair % len(CHANGES)],) * 2):
            for side in ("a", "b"):
                seed += 1
                path = arguments.folder / f"{pair:03d}-{sort}-{side}.pt.trace.json.gz"
                recorder.record(path, seed, change if side == "b" else None)


if __name__ == "__main__":
    main()
