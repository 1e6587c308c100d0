"""Hand-made merged trace with round numbers and without torch: two layers, a GPU, any number of calls.

Each call of a layer takes 100 µs on the host:

    block   0 .. 100   router 10 .. 30 (aten::linear 12 .. 20)
                       experts 40 .. 90 (index 42 .. 46, mm 50 .. 60, silu 62 .. 66, mm 70 .. 80,
                                         sum 82 .. 86)

and every operator launches one kernel, 1000 µs later on the device, as long as the operator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.schema import Lost, Recording, RouterInfo, RoutingSample
from moe_trace.timeline.merge import merge_recording

OPS = (
    ("aten::linear", 12, 8),
    ("aten::index", 42, 4),
    ("aten::mm", 50, 10),
    ("aten::silu", 62, 4),
    ("aten::mm", 70, 10),
    ("aten::sum", 82, 4),
)
BASE_NS = 1_700_000_000_000_000_000
EXPERTS = 4
TOP_K = 2
LAYERS = 2


def router(layer: int, *, site: str | None = None) -> RouterInfo:
    return RouterInfo(
        site=site or f"L{layer:02d}",
        name=f"model.layers.{layer}.mlp.gate",
        layer=layer,
        router_class="OlmoeTopKRouter",
        experts_class="OlmoeExperts",
        contract="topk-experts",
        num_experts=EXPERTS,
        top_k=TOP_K,
        router_flops_per_token=64,
        expert_flops_per_slot=1000,
    )


def sample(
    info: RouterInfo, call: int, start_us: float, counts: Sequence[int] = (1, 2, 3, 2), **changes: Any
) -> RoutingSample:
    slots = sum(counts)
    tokens = slots // TOP_K
    made = RoutingSample(
        site=info.site,
        name=info.name,
        layer=info.layer,
        call=call,
        step=call,
        phase="forward",
        stage="prefill" if call == 0 else "decode",
        tokens=tokens,
        top_k=TOP_K,
        assignments=np.array(counts, np.int64),
        skipped=tokens * TOP_K - slots,
        computed_slots=slots,
        padding_assignments=0,
        nonfinite_tokens=0,
        router_entropy=1.0 + 0.01 * call,
        confidence=0.25,
        top1_prob=0.5,
        topk_mass=0.75,
        z_loss=2.0,
        k_histogram=np.array([0, 0, tokens], np.int64),
        router_flops=64 * tokens,
        expert_flops=1000 * slots,
        memory_allocated_bytes=1024,
        host_start_ns=BASE_NS + int(1000 * (start_us + 11)),
        host_end_ns=BASE_NS + int(1000 * (start_us + 29)),
        thread=7,
        profiled=True,
    )
    return replace(made, **changes)


def events(
    site: str, start_us: float, first_id: int, stretch: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """One call's events; `stretch` makes kernels longer or shorter than their operators."""
    found: list[dict[str, Any]] = []

    def add(cat: str, name: str, ts: float, dur: float, pid: Any = 7, tid: Any = 7, **args: Any) -> None:
        found.append(
            {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}
        )

    for kind, offset, length in (("block", 0, 100), ("router", 10, 20), ("experts", 40, 50)):
        add("user_annotation", f"moe.{kind}/{site}", start_us + offset, length, **{"External id": first_id})
        add(
            "gpu_user_annotation",
            f"moe.{kind}/{site}",
            start_us + 1000 + offset,
            length,
            pid=0,
            tid=3,
            **{"External id": first_id},
        )
        first_id += 1
    for name, offset, length in OPS:
        add("cpu_op", name, start_us + offset, length, **{"External id": first_id})
        add("cuda_runtime", "cudaLaunchKernel", start_us + offset + 1, 1, correlation=first_id)
        duration = length * stretch(name)
        add("kernel", f"k_{name}", start_us + 1000 + offset, duration, pid=0, tid=3, correlation=first_id)
        first_id += 1
    return found


def write_tiny(
    path: Path,
    *,
    calls: int = 3,
    counts: Callable[[int, int], Sequence[int]] = lambda layer, call: (1, 2, 3, 2),
    stretch: Callable[[int, int, str], float] = lambda layer, call, name: 1.0,
    model: dict[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    devices: Sequence[str] = ("NVIDIA H200",),
    indent: int | None = None,
    change: Callable[[RoutingSample], RoutingSample] = lambda made: made,
) -> Path:
    """Write and merge the trace; `path` may end in `.json` or `.json.gz`."""
    import gzip

    routers = [router(layer, site=sites[layer] if sites else None) for layer in range(LAYERS)]
    trace_events: list[dict[str, Any]] = []
    samples = []
    for call in range(calls):
        for info in routers:
            start = 10_000.0 * call + 200.0 * info.layer
            identity = 1 + 100 * (call * LAYERS + info.layer)
            layer = info.layer
            trace_events += events(
                info.site, start, identity, lambda name, layer=layer, call=call: stretch(layer, call, name)
            )
            samples.append(change(sample(info, call, start, counts(layer, call))))
    trace = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": i, "name": name} for i, name in enumerate(devices)],
        "baseTimeNanoseconds": BASE_NS,
        "traceEvents": trace_events,
        "traceName": path.name,
    }
    text = json.dumps(trace, indent=indent).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    recording = Recording(
        model=model
        or {"name": "tiny", "class": "Tiny", "num_layers": 2, "dtype": "bfloat16", "hidden_size": 8},
        options={},
        routers=tuple(routers),
        samples=tuple(samples),
        lost=Lost(),
        versions={"torch": "2.13.0", "moe_trace": "0.1.0"},
    )
    merge_recording(path, [recording])
    return path
