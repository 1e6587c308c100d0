"""One row per router call, with all of its figures: what CSV, Parquet and data frames hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_trace.data.load_stats import describe_load
from moe_trace.data.schema import RANGE_KINDS, RoutingSample
from moe_trace.data.summary import SampleKey, host_us
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.read.time.phases import CallTimes

_COUNTS = (
    "call",
    "step",
    "phase",
    "stage",
    "tokens",
    "top_k",
    "skipped",
    "computed_slots",
    "padding_assignments",
    "nonfinite_tokens",
    "router_entropy",
    "confidence",
    "top1_prob",
    "topk_mass",
    "z_loss",
    "router_flops",
    "expert_flops",
    "memory_allocated_bytes",
)


def call_rows(
    samples: Sequence[RoutingSample], times: CallTimes | None, busy_us: Mapping[SampleKey, float]
) -> list[dict[str, Any]]:
    """Flat rows with the same keys throughout; times in microseconds; lists for counts per expert."""
    index = {(s.name, s.call): i for i, s in enumerate(times.samples)} if times is not None else {}
    rows = []
    for sample in samples:
        key = (sample.name, sample.call)
        rows.append(_row(sample, busy_us.get(key)) | _phase_columns(times, index.get(key)) | _lists(sample))
    return rows


def _row(sample: RoutingSample, busy_us: float | None) -> dict[str, Any]:
    load = describe_load(sample.assignments)
    row: dict[str, Any] = {"site": sample.site, "name": sample.name, "layer": sample.layer}
    row |= {name: getattr(sample, name) for name in _COUNTS}
    row |= {
        "load_max_over_mean": load.max_over_mean,
        "load_cv": load.cv,
        "load_gini": load.gini,
        "load_entropy": load.entropy,
        "active_experts": load.active_experts,
        "router_host_us": host_us(sample),
        "router_device_busy_us": busy_us,
    }
    placement = sample.placement
    for kind in RANGE_KINDS:
        host = placement.host.get(kind) if placement is not None else None
        device = placement.device.get(kind) if placement is not None else None
        row[f"{kind}_start_us"] = host.start_us if host is not None else None
        row[f"{kind}_range_us"] = host.duration_us if host is not None else None
        row[f"{kind}_device_start_us"] = device.start_us if device is not None else None
        row[f"{kind}_device_span_us"] = device.duration_us if device is not None else None
    return row


def _lists(sample: RoutingSample) -> dict[str, Any]:
    return {"assignments": sample.assignments.tolist(), "k_histogram": sample.k_histogram.tolist()}


def _phase_columns(times: CallTimes | None, index: int | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    device = times is not None and times.device_known
    sources = {
        "host_us": times.forward.host_ns if times else None,
        "device_us": times.forward.busy_ns if times and device else None,
        "backward_host_us": times.backward.host_ns if times and times.backward else None,
        "backward_device_us": times.backward.busy_ns if times and times.backward and device else None,
    }
    for suffix, values in sources.items():
        for column, phase in enumerate(PHASES):
            known = values is not None and index is not None
            row[f"phase_{phase}_{suffix}"] = int(values[index, column]) / 1000 if known else None  # type: ignore[index]
    whole = {
        "block_host_us": times.block_host_ns if times else None,
        "block_host_gap_us": times.host_gap_ns if times else None,
        "block_device_gap_us": times.device_gap_ns if times and device else None,
    }
    for name, column_values in whole.items():
        known = column_values is not None and index is not None
        row[name] = int(column_values[index]) / 1000 if known else None  # type: ignore[index]
    return row
