"""A summary as JSON. Keys are added over time, never renamed (docs/reading.md lists them)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe_trace.data.display.json import json_text
from moe_trace.data.schema import SCHEMA_VERSION
from moe_trace.data.summary import RouterSummary, Summary
from moe_trace.read.analysis import TraceSummary


def render_json(summary: Summary) -> str:
    """Indented JSON text, without NaN or infinity."""
    return json_text(to_plain(summary))


def to_plain(summary: Summary) -> dict[str, Any]:
    """The summary as dicts, lists, strings and numbers."""
    plain: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "trace": summary.trace,
        "model": dict(summary.model),
        "options": dict(summary.options),
        "rank": summary.rank,
        "versions": dict(summary.versions),
        "lost": asdict(summary.lost),
        **_figures(summary),
        "notes": list(summary.notes),
    }
    if isinstance(summary, TraceSummary):
        plain["files"] = list(summary.files)
        plain["stage"] = summary.stage
        plain["coverage"] = _coverage(summary)
        plain["stages"] = {stage: _figures(part) for stage, part in summary.stages.items()}
    return plain


def _coverage(summary: TraceSummary) -> dict[str, Any]:
    if summary.times is None:
        return {}
    return {
        name: {"joined": c.joined, "total": c.total, "share": c.share, "known": c.known}
        for name, c in summary.times.coverage.items()
    }


def _figures(summary: Summary) -> dict[str, Any]:
    """What differs from stage to stage."""
    plain: dict[str, Any] = {
        "routers": [_router(router) for router in summary.routers],
        "totals": asdict(summary.totals),
    }
    if isinstance(summary, TraceSummary):
        plain |= {
            "phases": asdict(summary.phases) if summary.phases is not None else None,
            "speed": asdict(summary.speed) if summary.speed is not None else None,
            "imbalance": [asdict(cost) for cost in summary.imbalance],
            "load_models": [asdict(model) for model in summary.load_models],
            "findings": [asdict(finding) for finding in summary.findings],
        }
        if summary.distinct is not None:
            plain["distinct"] = asdict(summary.distinct)
        if summary.physical is not None:
            plain["physical"] = asdict(summary.physical)
        if summary.ranks is not None:
            plain["ranks"] = asdict(summary.ranks)
    return plain


def _router(router: RouterSummary) -> dict[str, Any]:
    info, decisions = router.info, router.decisions
    return {
        "site": info.site,
        "name": info.name,
        "layer": info.layer,
        "num_experts": info.num_experts,
        "top_k": info.top_k,
        "router_class": info.router_class,
        "experts_class": info.experts_class,
        "calls": router.calls,
        "recomputed_calls": router.recomputed_calls,
        "tokens": router.tokens,
        "assignments": list(router.assignments),
        "skipped": router.skipped,
        "padding_assignments": router.padding_assignments,
        "nonfinite_tokens": router.nonfinite_tokens,
        "load": asdict(router.load),
        "chance": asdict(router.chance),
        "router": asdict(decisions),
        "latency_us": asdict(router.latency),
        "recompute_latency_us": asdict(router.recompute_latency),
        "flops": {
            "router": router.flops.router,
            "experts": router.flops.experts,
            "shared": router.flops.shared,
            "total": router.flops.total,
        },
        "recomputed_flops": router.flops.recomputed,
        "memory_max_bytes": router.memory_max_bytes,
    }
