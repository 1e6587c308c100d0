"""Hand-made merged traces of several ranks, with round numbers and known clock offsets.

Every rank runs the layers of `tiny_trace` at the same true times; its experts' range also contains three
NCCL all-to-alls, with kernels at these true microseconds after the start of the call:

    counts     all ranks 1047 .. 1049
    dispatch   rank r arrives at 1050 + 3 r, all end at 1065
    combine    rank r arrives at 1087 + 10 r, all end at 1130

So the last of R ranks always arrives last: rank r waits 3 (R - 1 - r) and 10 (R - 1 - r) µs.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.schema import Lost, Parallel, Recording, RoutingSample
from moe_trace.timeline.merge import merge_recording
from tiny_trace import BASE_NS, EXPERTS, LAYERS, events, router, sample

SLOT_BYTES = 16  # hidden size 8, bfloat16
CALL_US = 10_000.0


def default_counts(rank: int, layer: int, call: int) -> tuple[int, ...]:
    return (1 + rank, 2, 3 + layer, 2 + (rank + layer) % 2 + 2 * call)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the ranks do, and how their clocks stand."""

    ranks: int = 2
    calls: int = 3
    offset_us: Sequence[float] = (0.0, 250.0, -40.0, 7.5)
    """What must be added to each rank's clock to get the true time."""
    base_ns: Sequence[int] = (BASE_NS, BASE_NS - 5_000_000, BASE_NS + 123_456, BASE_NS)
    hosts: Sequence[str | None] = (None, None, None, None)
    counts: Callable[[int, int, int], Sequence[int]] = default_counts
    jitter_us: Callable[[int, int, str], float] = lambda rank, call, role: 0.0
    """Added to the end of a rank's kernel."""
    stretch: Callable[[int, int, int, str], float] = lambda rank, layer, call, name: 1.0
    """How much longer a rank's kernel takes than its operator."""
    with_collectives: bool = True
    sequence: bool = False
    exchange: str | None = "all_to_all"
    change_split: Callable[[int, int, int, str, list[int]], list[int]] = lambda r, layer, call, part, s: s
    change_sample: Callable[[int, RoutingSample], RoutingSample] = lambda rank, made: made
    steps: bool = True
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    world_size: int | None = None
    slots: int = 0
    """Of a load balancer, over all ranks; 0 where each expert has its place."""
    suffix: str = ".pt.trace.json"


MODEL = {
    "name": "tiny",
    "class": "Tiny",
    "num_layers": 2,
    "dtype": "bfloat16",
    "hidden_size": 8,
}


def held_by(rank: int, ranks: int, experts: int = EXPERTS) -> tuple[int, ...]:
    each = experts // ranks
    return tuple(range(rank * each, (rank + 1) * each))


def sent(run: Run, rank: int, to: int, layer: int, call: int) -> int:
    """Slots that a rank sends to another, by brute force."""
    return sum(run.counts(rank, layer, call)[expert] for expert in held_by(to, run.ranks))


def write_ranks(folder: Path, run: Run = Run(), ranks: Sequence[int] | None = None) -> list[Path]:
    """One merged trace a rank, `rank0.pt.trace.json` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_rank(folder, run, rank) for rank in (range(run.ranks) if ranks is None else ranks)]


def write_rank(folder: Path, run: Run, rank: int) -> Path:
    path = folder / f"rank{rank}{run.suffix}"
    found, samples = _events_and_samples(run, rank)
    move_us = run.offset_us[rank] + (run.base_ns[rank] - BASE_NS) / 1000
    for event in found:
        event["ts"] = round(event["ts"] - move_us, 3)
    trace: dict[str, Any] = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": run.ranks},
        "baseTimeNanoseconds": run.base_ns[rank],
        "traceEvents": found,
        "traceName": path.name,
    }
    if run.hosts[rank] is not None:
        trace = {"host_name": run.hosts[rank], **trace}
    text = json.dumps(trace).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    merge_recording(path, [recording_of(run, rank, samples)])
    return path


def recording_of(run: Run, rank: int, samples: Sequence[RoutingSample]) -> Recording:
    everyone = tuple(range(run.ranks))
    shared = run.exchange == "all_reduce"
    held = held_by(rank, run.ranks, run.slots or EXPERTS) if run.exchange else None
    parallel = Parallel(
        mesh={"ep": run.ranks},
        token_ranks=everyone if shared else (rank,),
        expert_ranks=everyone if run.exchange else (),
        expert_exchange=run.exchange,  # type: ignore[arg-type]
    )
    return Recording(
        model=run.model,
        options={},
        routers=tuple(
            replace(router(layer), held_experts=held, num_slots=run.slots) for layer in range(LAYERS)
        ),
        samples=tuple(samples),
        lost=Lost(),
        rank=rank,
        world_size=run.world_size or run.ranks,
        versions={"torch": "2.13.0", "moe_trace": "0.1.0"},
        parallel=parallel,
    )


def _events_and_samples(run: Run, rank: int) -> tuple[list[dict[str, Any]], list[RoutingSample]]:
    found: list[dict[str, Any]] = _metadata()
    samples = []
    move_ns = round(1000 * run.offset_us[rank])
    for call in range(run.calls):
        for layer in range(LAYERS):
            start = CALL_US * call + 200.0 * layer
            identity = 1 + 100 * (call * LAYERS + layer)
            info = router(layer)
            stretch = functools.partial(run.stretch, rank, layer, call)
            found += events(info.site, start, identity, stretch)
            if run.with_collectives:
                found += _collectives(run, rank, layer, call, start, identity + 50)
            made = sample(info, call, start, run.counts(rank, layer, call), slot_bytes=SLOT_BYTES)
            made = replace(
                made,
                host_start_ns=made.host_start_ns - move_ns,
                host_end_ns=made.host_end_ns - move_ns,
            )
            samples.append(run.change_sample(rank, made))
        if run.steps:
            found.append(_slice("user_annotation", f"ProfilerStep#{call}", CALL_US * call - 50, 5000.0, 7, 7))
    return found, samples


def _metadata() -> list[dict[str, Any]]:
    values = [(7, "python", "CPU", 7), (0, "python", "GPU 0", 5_000_000)]
    return [
        {"ph": "M", "name": name, "pid": pid, "tid": 0, "ts": 0.0, "args": args}
        for pid, process, labels, index in values
        for name, args in (
            ("process_name", {"name": process}),
            ("process_labels", {"labels": labels}),
            ("process_sort_index", {"sort_index": index}),
        )
    ]


def _slice(cat: str, name: str, ts: float, dur: float, pid: Any, tid: Any, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def _collectives(
    run: Run, rank: int, layer: int, call: int, start: float, identity: int
) -> list[dict[str, Any]]:
    out = [sent(run, rank, to, layer, call) for to in range(run.ranks)]
    back = [sent(run, peer, rank, layer, call) for peer in range(run.ranks)]
    kernels = {
        "counts": (1047.0, 1049.0),
        "dispatch": (1050.0 + 3 * rank, 1065.0),
        "combine": (1087.0 + 10 * rank, 1130.0),
    }
    splits = {"counts": ([], []), "dispatch": (out, back), "combine": (back, out)}
    found = []
    for number, (part, host) in enumerate((("counts", 47.0), ("dispatch", 48.5), ("combine", 87.0))):
        split_in, split_out = (run.change_split(rank, layer, call, part, list(s)) for s in splits[part])
        width = 8 if part != "counts" else 1
        elements_in = 8 * sum(split_in) if width == 8 else EXPERTS
        elements_out = 8 * sum(split_out) if width == 8 else EXPERTS
        first, last = kernels[part]
        arguments: dict[str, Any] = {
            "Collective name": "all_to_allv",
            "In msg nelems": elements_in,
            "Out msg nelems": elements_out,
            "In split size": json.dumps(split_in),
            "Out split size": json.dumps(split_out),
            "dtype": "Long" if part == "counts" else "BFloat16",
            "Group size": run.ranks,
            "Process Group Name": "3",
            "Process Group Ranks": json.dumps(list(range(run.ranks))),
        }
        if run.sequence:
            arguments["Seq"] = 3 * (call * LAYERS + layer) + number
        link = identity + number
        end = last + run.jitter_us(rank, call, part)
        found += _call(start + host, start + first, end - first, link, arguments)
    return found


def _call(
    host: float, first: float, length: float, link: int, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    """The call on the host, its launch, its kernel, and the arrow between them."""
    identity = {"External id": link}
    flow = {"cat": "ac2g", "name": "ac2g", "id": link}
    return [
        _slice("cpu_op", "record_param_comms", host, 1.0, 7, 7, **identity, **arguments),
        _slice("cuda_runtime", "cudaLaunchKernel", host + 0.25, 0.5, 7, 7, correlation=link),
        _slice("kernel", "ncclDevKernel_SendRecv", first, length, 0, 5, correlation=link, **arguments),
        {"ph": "s", "pid": 7, "tid": 7, "ts": host + 0.25, **flow},
        {"ph": "f", "pid": 0, "tid": 5, "ts": first, "bp": "e", **flow},
    ]


def counts_array(run: Run, rank: int, layer: int) -> np.ndarray:
    """[E] assignments over all calls."""
    return np.sum([run.counts(rank, layer, call) for call in range(run.calls)], axis=0)
