"""Hand-made traces of graph replays, with round numbers and no torch. Times in µs.

A replay launched at t on the host takes 10 there. Its six kernels run one after another from t + 100 on,
10 each with a gap of 2: one before the router, two of the router (t + 112 .. 134), one between, one of the
experts (t + 148 .. 158), one after. Thread 7, stream 3 of device 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_trace.data.schema import (
    CapturedGraph,
    GraphCall,
    GraphMark,
    Lost,
    Recording,
    RoutingSample,
    graph_digest,
)
from tiny_trace import BASE_NS, router, sample

GRIDS = (1, 2, 3, 4, 5, 6)
NODES = [f"{grid},1,1 128,1,1" for grid in GRIDS]
THREAD, STREAM = 7, 3
NAME = router(0).name


def ns(time_us: float) -> int:
    return BASE_NS + round(1000 * time_us)


def event(cat: str, name: str, ts: float, dur: float, *, pid: Any = 7, tid: Any = THREAD, **args: Any) -> Any:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def replay(
    time_us: float,
    correlation: int,
    *,
    grids: Sequence[int] = GRIDS,
    streams: Sequence[int] = (),
    node_ids: Sequence[int] = (),
    compiled: bool = False,
) -> list[Any]:
    """The launch and the kernels of one replay; `compiled`: one of them is Inductor's, and scatters."""
    found = [event("cuda_runtime", "cudaGraphLaunch", time_us, 10, correlation=correlation)]
    for i, grid in enumerate(grids):
        args: dict[str, Any] = {"correlation": correlation, "grid": [grid, 1, 1], "block": [128, 1, 1]}
        if node_ids:
            args["graph node id"] = node_ids[i]
        stream = streams[i] if streams else STREAM
        name = "void f<{lambda(int)#1}>(int)"  # braces, as C++ has them
        if compiled and i == 1:
            name = "triton_poi_fused_cat_index_put_7"
        found.append(event("kernel", name, time_us + 100 + 12 * i, 10, pid=0, tid=stream, **args))
    return found


def copy_of_mark(time_us: float, correlation: int, *, stream: int = STREAM) -> list[Any]:
    """The copy of the device's count that a mark launches."""
    return [
        event("cuda_runtime", "cudaMemcpyAsync", time_us, 2, correlation=correlation),
        event("gpu_memcpy", "Memcpy DtoH", time_us + 5, 1, pid=0, tid=stream, correlation=correlation),
    ]


def mark(time_us: float, forwards: int, seen: int = 0) -> GraphMark:
    """The mark that such a copy belongs to."""
    return GraphMark(
        start_ns=ns(time_us - 1), end_ns=ns(time_us + 3), thread=THREAD, forwards=forwards, seen=seen
    )


def forward_range(time_us: float, dur: float, external_id: int, *, device: tuple[float, float] | None) -> Any:
    """A range round the model's forward, with the annotation of its kernels."""
    args = {"External id": external_id}
    found = [event("user_annotation", "moe.graph/Tiny", time_us, dur, **args)]
    if device is not None:
        start, length = device
        found.append(event("gpu_user_annotation", "moe.graph/Tiny", start, length, pid=0, tid=STREAM, **args))
    return found


def seen(call: int, time_us: float, layer: int = 0) -> RoutingSample:
    """A call inside a graph, of a forward that the host saw begin."""
    return sample(
        router(layer), call, time_us, in_graph=True, host_start_ns=ns(time_us), host_end_ns=ns(time_us)
    )


def unseen(call: int, forward: int, layer: int = 0) -> RoutingSample:
    """A call of a forward that only the device counted."""
    return sample(
        router(layer),
        call,
        0.0,
        in_graph=True,
        host_start_ns=0,
        host_end_ns=0,
        thread=0,
        graph_forward=forward,
    )


def captured(
    nodes: Sequence[str] = NODES[:5], *, problem: str | None = None, shift: int = 0
) -> CapturedGraph:
    """The graph of the replays above, noted up to its experts."""
    return CapturedGraph(
        nodes=len(nodes),
        digest=graph_digest(nodes),
        calls=(
            GraphCall(name=NAME, kind="router", first=1 + shift, last=3 + shift),
            GraphCall(name=NAME, kind="experts", first=4, last=5),
        ),
        problem=problem,
    )


def write_trace(path: Path, events: Sequence[Any]) -> Path:
    """As the profiler would write it, with its own span round everything from 0 to 100 000."""
    whole = event("Trace", "PyTorch Profiler (0)", 0, 100_000, pid="Spans", tid="PyTorch Profiler")
    trace = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}],
        "baseTimeNanoseconds": BASE_NS,
        "traceEvents": [*events, whole],
        "traceName": path.name,
    }
    path.write_text(json.dumps(trace))
    return path


def recording(samples: Sequence[RoutingSample], **changes: Any) -> Recording:
    return Recording(
        model={"name": "tiny", "class": "Tiny", "num_layers": 2},
        options={},
        routers=(router(0), router(1)),
        samples=tuple(samples),
        lost=Lost(),
        **changes,
    )
