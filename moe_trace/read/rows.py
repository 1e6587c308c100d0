"""One row per router call with all of its metrics, for CSV, Parquet and data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from moe_trace.data.calls.table import NUMBERS, CallTable, RouterKey, known_values
from moe_trace.data.display.columns import Column, column_of
from moe_trace.data.load_stats import describe_loads
from moe_trace.data.schema import RANGE_KINDS, RoutingSample
from moe_trace.data.summary import SampleKey
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.read.time.phases import CallTimes

_SAMPLE_COLUMNS = {
    "site": Column("layer", "Label of the router: its layer, and which of its routers where it has several."),
    "name": Column("router", "Path of the router's module."),
    "layer": Column("layer index", "Index of the layer in the model."),
    "call": Column("call", "0, 1, 2 ... per router, over the calls that were recorded."),
    "step": Column("step", "The profiler's or the tracer's step that the call is of."),
    "phase": Column("pass", "recompute: gradient checkpointing ran the forward again. It counts in no load."),
    "stage": Column("stage", "What the model was doing: prefill, decode, train, mixed."),
    "tokens": Column("tokens", "Rows that the router saw, padding included.", unit="tokens"),
    "top_k": Column("k", "Slots of each token.", unit="slots"),
    "skipped": column_of("skipped"),
    "computed_slots": Column("computed slots", "Slots whose expert ran: the base of FLOPs.", unit="slots"),
    "padding_assignments": column_of("padding"),
    "nonfinite_tokens": Column("nonfinite", "Tokens whose logits hold NaN or infinity.", unit="tokens"),
    "router_entropy": column_of("router entropy"),
    "confidence": column_of("router confidence"),
    "top1_prob": Column("top-1 probability", "Largest softmax probability, mean over tokens."),
    "topk_mass": Column("top-k mass", "Softmax probability of the chosen experts, mean over tokens."),
    "z_loss": Column("z-loss", "Mean of logsumexp(logits)²: ST-MoE, arXiv:2202.08906, equation 5."),
    "router_flops": Column("router FLOP", "Of the call, by formula.", unit="FLOP"),
    "expert_flops": Column("experts FLOP", "Of the routed experts, by formula.", unit="FLOP"),
    "memory_allocated_bytes": Column("memory", "What torch's allocator held on the device.", unit="bytes"),
    "prefill_tokens": Column("prefill tokens", "Where a host framework reports them.", unit="tokens"),
    "decode_tokens": Column(
        "decode tokens", "Generated tokens, where a host framework reports them.", unit="tokens"
    ),
    "requests": Column("requests", "Whose tokens they are, where a host framework reports it."),
    "prefill_requests": Column("prefill requests", "Those with a prefill token."),
}
"""Columns for fields of `RoutingSample`."""

LISTS_OF_ROWS = ("assignments", "prefill_assignments", "decode_assignments", "k_histogram")
_LOAD_COLUMNS = {"max_over_mean": "max÷mean", "cv": "CV", "gini": "Gini", "entropy": "entropy"}

COLUMNS: dict[str, Column] = {
    **_SAMPLE_COLUMNS,
    **{f"load_{name}": column_of(heading) for name, heading in _LOAD_COLUMNS.items()},
    "active_experts": column_of("active"),
    "router_host_us": column_of("router host µs"),
    "router_device_busy_us": column_of("router device busy µs"),
    **{
        f"{kind}_{name}_us": Column(f"{kind} {label}", definition, unit="µs")
        for kind in RANGE_KINDS
        for name, label, definition in (
            ("start", "start", "Start of its range on the host, since the trace's `baseTimeNanoseconds`."),
            ("range", "range", "Length of its range on the host."),
            ("device_start", "device start", "Start of its first kernel."),
            ("device_span", "device span", "From its first kernel to its last, gaps included."),
        )
    },
    **{
        f"phase_{phase}_{name}_us": column_of(f"{phase} {label} µs")
        for name, label in (
            *(("host", "host"), ("device", "device busy")),
            *(("backward_host", "backward host"), ("backward_device", "backward device busy")),
        )
        for phase in PHASES
    },
    "block_host_us": column_of("block host µs"),
    "block_host_gap_us": column_of("block host gap µs"),
    "block_device_gap_us": column_of("block device gap µs"),
    "assignments": column_of("assignments"),
    "prefill_assignments": Column("prefill assignments", "Those of prefill tokens.", unit="slots"),
    "decode_assignments": Column("decode assignments", "Those of decode tokens.", unit="slots"),
    "k_histogram": Column("k histogram", "Tokens by the number of slots that they used.", unit="tokens"),
}
"""Label, unit and definition by column name, in the order of the rows."""


def call_rows(
    samples: Sequence[RoutingSample], times: CallTimes | None, busy_us: Mapping[SampleKey, float]
) -> list[dict[str, Any]]:
    """Return flat rows with the keys of `COLUMNS`; None where unknown, and lists for counts per expert."""
    calls = CallTable.of(samples)
    keys, loads = calls.call_keys(), describe_loads(calls.assignments)
    unknown = [None] * len(calls)
    columns: dict[str, Iterable[Any]] = {
        **dict.fromkeys(COLUMNS, unknown),
        **{name: getattr(calls, name).tolist() for name in RouterKey._fields},
        **{name: calls.values(name) for name in _SAMPLE_COLUMNS if name in NUMBERS},
        **{f"load_{name}": known_values(getattr(loads, name)) for name in _LOAD_COLUMNS},
        "active_experts": loads.active_experts.tolist(),
        "router_host_us": calls.host_us().tolist(),
        "router_device_busy_us": map(busy_us.get, keys),
        **{name: calls.lists[name].to_lists() for name in LISTS_OF_ROWS},
    }
    for (side, kind), spans in calls.places.spans.items():
        names = ("start", "range") if side == "host" else ("device_start", "device_span")
        columns |= {f"{kind}_{name}_us": known_values(spans[:, i]) for i, name in enumerate(names)}
    if times is not None:
        placed = times.us_in(calls)
        columns |= {name: known_values(placed(values)) for name, values in _phases_ns(times).items()}
    return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _phases_ns(times: CallTimes) -> dict[str, npt.NDArray]:
    """Return the known columns of the calls' phases, with a value per row of the times."""
    columns = {"block_host_us": times.block_host_ns, "block_host_gap_us": times.host_gap_ns}
    if times.device_known:
        columns["block_device_gap_us"] = times.device_gap_ns
    for way, of_way in (("", times.forward), ("backward_", times.backward)):
        if of_way is None:
            continue
        for i, phase in enumerate(PHASES):
            columns[f"phase_{phase}_{way}host_us"] = of_way.host_ns[:, i]
            if times.device_known:
                columns[f"phase_{phase}_{way}device_us"] = of_way.busy_ns[:, i]
    return columns
