"""Routing metrics in vLLM's `/metrics`: the last lines that the workers wrote.

Names and help texts are also used by `metrics`. No torch: the process that answers may have no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = "MOE_TRACE_VLLM_METRICS"
"""Environment variable: output file for metrics of a serving run, with or without a profiler."""
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"

FIGURES = {
    "load_max_over_mean": "Busiest expert's assignments over the mean of its layer, in the last window",
    "distinct_experts": "Experts of a layer that got a token, mean over the forwards of the last window",
    "dead_experts": "Experts of a layer that got no token in the last window",
}
"""Metrics of each layer, as gauges `moe_trace_<figure>{rank, layer}`."""
COUNTS = {
    "tokens": "Tokens that the routers saw, in recorded forwards",
    "forwards": "Forwards whose routing was recorded",
}
"""Totals since the start, as counters `moe_trace_<count>_total{rank}`."""
_TAIL_BYTES = 1 << 20


def values_of(line: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield (name, label values, value) from one line."""
    rank = str(line["rank"])
    for name in COUNTS:
        yield name, (rank,), line[f"{name}_total"]
    for site, figures in line["layers"].items():
        for name, value in figures.items():
            if name in FIGURES and value is not None:
                yield name, (rank, site), value


class FileCollector:
    """Collector of the last line of each rank, read whenever `/metrics` is requested."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def collect(self) -> Iterator[Any]:
        """Yield Prometheus metric families; none before the first line."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {
            name: GaugeMetricFamily(f"moe_trace_{name}", text, labels=["rank", "layer"])
            for name, text in FIGURES.items()
        }
        for name, text in COUNTS.items():
            families[name] = CounterMetricFamily(f"moe_trace_{name}", text, labels=["rank"])
        for line in last_lines(self.path).values():
            for name, labels, value in values_of(line):
                families[name].add_metric(labels, value)
        yield from (family for family in families.values() if family.samples)


def last_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Return the newest complete line of each rank near the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    found: dict[int, dict[str, Any]] = {}
    for text in lines:
        try:
            line = json.loads(text)
            found[line["rank"]] = line
        except (ValueError, TypeError, KeyError):
            continue  # truncated at the start, or still being written
    return found


def serve_metrics() -> None:
    """Register the file with this process's default Prometheus registry, if metrics are requested."""
    path = os.environ.get(PATH)
    if not path or os.environ.get(MULTIPROCESS):
        return
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    known = [c for c in list(REGISTRY._collector_to_names) if isinstance(c, FileCollector)]
    if not known:
        REGISTRY.register(FileCollector(Path(path)))
