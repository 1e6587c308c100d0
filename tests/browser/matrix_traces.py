"""Traces of the viewer matrix, merged by this release, with their contents by a plain reading of the JSON.

To include another recorded trace, add its name to `RECORDED`.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moe_trace
from moe_trace.cli import main
from moe_trace.data.schema import BAND_NAME
from moe_trace.demo import DEMO_PROMPTS, load_demo_model
from moe_trace.read.file.trace_file import read_trace
from moe_trace.timeline.merge import merge_recording
from paths import DATA

from .test_dashboard import record_two_ranks

ENDING = ".pt.trace.json.gz"
RECORDED = {
    name: DATA / "h100" / f"{name}{ENDING}"
    for name in (
        "prefill_decode_16_layers",
        "prefill_all_options",
        "train_checkpointed",
        "train_checkpointed_reentrant",
        "compiled_model",
        "captured_by_hand",
        "generate_static_cache",
    )
}
RECORDED["compiled_with_notes"] = DATA / "h100_compiled" / f"compiled_model{ENDING}"
"""Its kernels are told apart by the compiler's provenance."""
NAMES = ("cpu_eager", *RECORDED, "two_ranks")


@dataclass(frozen=True)
class Held:
    """What the file holds, read by `json` alone."""

    operators: Counter[str]
    outer_operators: Counter[str]
    """Without those that an equally named one calls directly: torch-tb-profiler counts some of these once."""
    kernels: Counter[str]
    counters: set[str]
    """Of our process."""
    lanes: set[str]

    @property
    def on_gpu(self) -> bool:
        return bool(self.kernels)


def write_trace(name: str, folder: Path) -> Path:
    """The trace of that name as the only file of the folder."""
    folder.mkdir(parents=True)
    if name == "cpu_eager":
        return _record_on_cpu(folder)
    target = folder / f"{name}{ENDING}"
    if name == "two_ranks":
        with tempfile.TemporaryDirectory() as apart:
            record_two_ranks(Path(apart) / "ranks", Path(apart) / "store")
            assert main(["merge", str(Path(apart) / "ranks"), "--out", str(target)]) == 0
        return target
    shutil.copy(RECORDED[name], target)
    merge_recording(target, [read_trace(target).recording])
    return target


def _record_on_cpu(folder: Path) -> Path:
    """With all that a profiler offers, so that every view of torch-tb-profiler has something to show."""
    model, tokenizer = load_demo_model()
    inputs = tokenizer(list(DEMO_PROMPTS.values())[:2], return_tensors="pt", padding=True)
    with (
        moe_trace.profile(
            model,
            activities=[torch.profiler.ProfilerActivity.CPU],
            on_trace_ready=moe_trace.tensorboard_trace_handler(
                folder, worker_name="cpu_eager", use_gzip=True
            ),
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
        ) as prof,
        torch.inference_mode(),
    ):
        for _ in range(2):
            model(**inputs)
            prof.step()
    return next(folder.glob(f"*{ENDING}"))


def read_plainly(path: Path) -> Held:
    """By `json`, event by event."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    events: Sequence[dict[str, Any]] = trace["traceEvents"]
    ours = {
        e["pid"]
        for e in events
        if e.get("ph") == "M" and e["name"] == "process_name" and e["args"]["name"].startswith(BAND_NAME)
    }
    in_band = [e for e in events if e.get("pid") in ours]
    return Held(
        operators=_names(events, "cpu_op"),
        outer_operators=_outer_operators(events),
        kernels=_names(events, "kernel"),
        counters={e["name"] for e in in_band if e.get("ph") == "C"},
        lanes={e["args"]["name"] for e in in_band if e.get("ph") == "M" and e["name"] == "thread_name"},
    )


def _names(events: Sequence[dict[str, Any]], category: str) -> Counter[str]:
    return Counter(e["name"] for e in events if e.get("ph") == "X" and e.get("cat") == category)


def _outer_operators(events: Sequence[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    stacks: dict[Any, list[tuple[float, str]]] = {}
    of_host = [e for e in events if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    for event in sorted(of_host, key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        found[event["name"]] += not (stack and stack[-1][1] == event["name"])
        stack.append((event["ts"] + event["dur"], event["name"]))
    return found
