"""Routing metrics of a serving run, without a trace: JSON Lines, and values in vLLM's `/metrics`.

    MOE_TRACE_VLLM_METRICS=/var/log/moe.jsonl vllm serve ...

A worker appends a line for each time window. Another process answers `/metrics`, so it reads the last lines
of that file on each request (`metrics_page`, in prometheus_client's default registry). If
`PROMETHEUS_MULTIPROC_DIR` is set, as with several API servers, vLLM's `/metrics` shows only what processes
wrote to that folder; the workers then write there, too.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_trace.data.calls.table import CallTable
from moe_trace.data.load_stats import ENOUGH_PER_EXPERT, max_over_mean
from moe_trace.data.schema import RoutingSample
from moe_trace.integrations.vllm.metrics_page import COUNTS, FIGURES, MULTIPROCESS, PATH, values_of
from moe_trace.record.parallel.engine import engine_layout
from moe_trace.record.parallel.environment import rank_and_world_size
from moe_trace.record.tracer import MoETracer

SECONDS = "MOE_TRACE_VLLM_METRICS_SECONDS"
EVERY = "MOE_TRACE_VLLM_METRICS_EVERY"
_MAX_QUEUED = 64

logger = logging.getLogger("vllm.moe_trace")


def window(samples: Sequence[RoutingSample]) -> dict[str, Any]:
    """Return the metrics of router calls taken together: `tokens`, `forwards`, and `layers` with `FIGURES`.

    Dead experts are None unless the layer made `ENOUGH_PER_EXPERT` assignments per expert.
    """
    calls = CallTable.of(samples)
    calls = calls.take(calls.forward)
    layers: dict[str, dict[str, float | int | None]] = {}
    forwards, tokens = 0, 0
    for index in sorted(set(calls.router.tolist()), key=calls.keys.__getitem__):
        of_router = calls.take(calls.router == index)
        loads_E = of_router.assignments.summed()
        found: dict[str, float | int | None] = {}
        layers[calls.keys[index].site] = found
        if loads_E.any():
            found["load_max_over_mean"] = round(max_over_mean(loads_E), 4)
        enough_tokens = len(loads_E) and loads_E.mean() >= ENOUGH_PER_EXPERT
        found["distinct_experts"] = round(float(of_router.assignments.used().mean()), 4)
        found["dead_experts"] = int((loads_E == 0).sum()) if enough_tokens else None
        forwards, tokens = max(forwards, len(of_router)), max(tokens, of_router.total("tokens"))
    return {"tokens": tokens, "forwards": forwards, "layers": layers}


class MetricsWriter:
    """Appends the metrics of each window to the file, from a separate thread.

    Args:
        tracer: an active tracer.
        path: path of the JSON Lines file.
        rank: written in each line.
        seconds: length of a window.
    """

    def __init__(self, tracer: MoETracer, path: Path, *, rank: int, seconds: float) -> None:
        self._tracer, self._path, self._rank, self._seconds = tracer, path, rank, seconds
        self._totals = dict.fromkeys(COUNTS, 0)
        self._shared = _shared() if os.environ.get(MULTIPROCESS) else {}
        self._queue: queue.Queue[Any] = queue.Queue(_MAX_QUEUED)
        self._held: list[RoutingSample] = []
        self._reading = threading.Lock()
        self._window_start = time.monotonic()
        self._thread = threading.Thread(target=self._write_all, name="moe_trace metrics", daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Discard calls recorded outside steps, in vLLM's runs of random tokens. Waits for the device.

        Taking batches alone would miss calls from compiled code, which would then count in the next window.
        """
        self._read_all()

    def keep(self) -> None:
        """Set aside calls recorded so far, before such a run. Waits for the device."""
        self._held += self._read_all()

    def step(self) -> None:
        """End a step of the engine; hand over the window if its time is up, without waiting."""
        if time.monotonic() - self._window_start >= self._seconds:
            self._queue_window()

    def close(self) -> None:
        """Write the last window and end the thread."""
        if self._thread.is_alive():
            self._queue_window()
            self._queue.put(None)
            self._thread.join()

    def _read_all(self) -> list[RoutingSample]:
        with self._reading:
            return self._tracer.samples_of(self._tracer.take_batches())

    def _queue_window(self) -> None:
        self._window_start = time.monotonic()
        window_of, self._held = (self._held, self._tracer.take_batches()), []
        try:
            self._queue.put_nowait(window_of)
        except queue.Full:
            logger.warning("moe_trace left out a window of its metrics: %s is written too slowly", self._path)

    def _write_all(self) -> None:
        try:
            while (window_of := self._queue.get()) is not None:
                held, batches = window_of
                with self._reading:
                    samples = [*held, *self._tracer.samples_of(batches)]
                if samples:
                    self._write(window(samples))
        except Exception as error:
            logger.warning("moe_trace writes no more metrics to %s: %r", self._path, error)

    def _write(self, found: dict[str, Any]) -> None:
        for name in COUNTS:
            self._totals[name] += found[name]
        total = {f"{name}_total": count for name, count in self._totals.items()}
        line = {"time": round(time.time(), 3), "rank": self._rank, **found, **total}
        with self._path.open("ab", buffering=0) as file:  # a single write keeps lines of several ranks intact
            file.write(json.dumps(line).encode() + b"\n")
        for name in COUNTS if self._shared else ():
            self._shared[name].labels(str(self._rank)).inc(found[name])
        for name, labels, value in values_of(line) if self._shared else ():
            if name in FIGURES:
                self._shared[name].labels(*labels).set(value)


def every() -> int:
    """Return the number of forwards per recorded forward."""
    return int(os.environ.get(EVERY, "1"))


def wanted() -> bool:
    """Return whether metrics are requested."""
    return bool(os.environ.get(PATH))


def start_metrics(tracer: MoETracer) -> MetricsWriter | None:
    """Start writing metrics; None if not requested, or if another rank writes those of the same tokens."""
    path = os.environ.get(PATH)
    layout = engine_layout(tracer.model)
    rank = rank_and_world_size()[0]
    if not path or (layout is not None and min(layout.token_ranks) != rank):
        return None
    writer = MetricsWriter(tracer, Path(path), rank=rank, seconds=float(os.environ.get(SECONDS, "10")))
    atexit.register(writer.close)  # an engine in this process may never be shut down
    return writer


def _shared() -> dict[str, Any]:
    from prometheus_client import Counter, Gauge

    labels = ["rank", "layer"]
    return {
        **{
            name: Gauge(f"moe_trace_{name}", text, labels, multiprocess_mode="livemostrecent")
            for name, text in FIGURES.items()
        },
        **{name: Counter(f"moe_trace_{name}", text, ["rank"]) for name, text in COUNTS.items()},
    }
