"""A summary as JSON. Keys are added over time, never renamed (docs/reading.md lists them)."""

from __future__ import annotations

from typing import Any

from moe_trace.data.display.json import attributes, json_text, plain
from moe_trace.data.schema import SCHEMA_VERSION
from moe_trace.data.summary import RouterSummary, Summary
from moe_trace.read.analysis import TraceSummary


def render_json(summary: Summary) -> str:
    """Return indented JSON text, without NaN or infinity."""
    return json_text(to_plain(summary))


def to_plain(summary: Summary) -> dict[str, Any]:
    """Return the summary as dicts, lists, strings and numbers."""
    entries: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **attributes(summary, "trace", "model", "options", "rank", "versions", "lost"),
        **_figures(summary),
        "notes": summary.notes,
    }
    if isinstance(summary, TraceSummary):
        entries |= attributes(summary, "files", "stage")
        coverage = summary.times.coverage.items() if summary.times is not None else ()
        entries["coverage"] = {
            name: attributes(part, "joined", "total", "share", "known") for name, part in coverage
        }
        entries["stages"] = {stage: _figures(part) for stage, part in summary.stages.items()}
    found: dict[str, Any] = plain(entries)
    return found


def _figures(summary: Summary) -> dict[str, Any]:
    """Return the entries that differ between stages."""
    entries = {"routers": [_router(router) for router in summary.routers], "totals": summary.totals}
    if isinstance(summary, TraceSummary):
        entries |= attributes(summary, "phases", "speed", "imbalance", "load_models", "findings")
        optional = attributes(summary, "distinct", "physical", "ranks")
        entries |= {name: figures for name, figures in optional.items() if figures is not None}
    return entries


def _router(router: RouterSummary) -> dict[str, Any]:
    figures = ("calls", "recomputed_calls", "tokens", "assignments", "skipped", "padding_assignments")
    return {
        **attributes(router.info, "site", "name", "layer", "num_experts", "top_k"),
        **attributes(router.info, "router_class", "experts_class"),
        **attributes(router, *figures, "nonfinite_tokens", "load", "chance", "memory_max_bytes"),
        "router": router.decisions,
        "latency_us": router.latency,
        "recompute_latency_us": router.recompute_latency,
        "flops": attributes(router.flops, "router", "experts", "shared", "total"),
        "recomputed_flops": router.flops.recomputed,
    }
