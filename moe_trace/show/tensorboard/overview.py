"""The Overview: facts, cards, and the report's findings, worst first, each with the view that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.display.columns import number_text
from moe_trace.data.display.json import attributes
from moe_trace.data.display.tables import number, scaled, share
from moe_trace.data.summary import model_name
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.findings.finding import Finding
from moe_trace.show.tensorboard.to_json import JsonDict
from moe_trace.show.text.phases import shares_sentence

FINDINGS_MAX = 200
VIEW_OF_RULE = {
    "moving_tokens": "time",
    "router_waits": "time",
    "launch_gaps": "time",
    "far_from_peak": "time",
    "uncounted_flops": "time",
    "costly_imbalance": "time",
    "weights_bind": "time",
}
"""Mapping from rule to view; all other rules belong to the routing view."""
_TOTALS = (
    ("MoE layers", "routers"),
    ("steps", "steps"),
    ("calls", "calls"),
    ("tokens", "tokens"),
    ("assignments", "assignments"),
    ("skipped", "skipped"),
    ("padding", "padding_assignments"),
    ("requests a forward", "requests_per_forward"),
)
"""Labels and names of the fields of `Totals` that are shown."""


class _Card(NamedTuple):
    """One of the five main metrics, without a value where the trace does not have it."""

    label: str
    view: str
    detail: str
    value: float | None = None
    text: str = "-"
    path: str | None = None
    site: str | None = None


def path_of(stage: str | None) -> str:
    """Return the prefix of a stage's metrics in the report's JSON: `` or `stages.prefill.`."""
    return f"stages.{stage}." if stage else ""


def overview(summary: TraceSummary) -> JsonDict:
    """Return the first page of a trace, with its stages in order."""
    stages: dict[str, TraceSummary] = {str(k): part for k, part in summary.stages.items()} or {"": summary}
    findings = summary.findings_apart()
    return {
        "stages": [_stage(stage, part, findings[stage]) for stage, part in stages.items()],
        "of_run": _findings(findings[""] if summary.stages else ()),
        "facts": facts(summary),
        "notes": list(summary.notes),
    }


def _stage(stage: str, part: TraceSummary, found: Sequence[Finding]) -> JsonDict:
    totals, requests = part.totals, part.totals.requests_per_forward
    counted = f"{totals.calls:,} calls in {totals.steps:,} {'step' if totals.steps == 1 else 'steps'}"
    counted += f", {totals.tokens:,} tokens"
    return {
        "stage": stage,
        "counted": counted if requests is None else f"{counted}, {requests:,.1f} requests a forward",
        "cards": cards(part, path_of(stage)),
        "findings": _findings(found),
        "phases": shares_sentence(part.phases) if part.phases is not None else None,
    }


def _findings(found: Sequence[Finding]) -> JsonDict:
    entries = [_finding(finding) for finding in found[:FINDINGS_MAX]]
    return {"shown": entries, "more": max(0, len(found) - FINDINGS_MAX)}


def _finding(finding: Finding) -> JsonDict:
    entries = attributes(finding, "rule", "severity", "price", "site", "sentence", "advice")
    return {**entries, "view": VIEW_OF_RULE.get(finding.rule, "routing")}


def facts(summary: TraceSummary) -> list[JsonDict]:
    """Return what was recorded: texts, and numbers with their path in the report's JSON."""
    model, totals, speed = summary.model, summary.totals, summary.speed
    device = speed.device if speed is not None and speed.device else model.get("device")
    texts = [
        ("model", model_name(model)),
        ("device", device or "unknown"),
        ("type", model.get("dtype") or "unknown"),
    ]
    found: list[JsonDict] = [{"label": label, "text": str(text)[:200]} for label, text in texts]
    return found + known_facts((label, getattr(totals, name), f"totals.{name}") for label, name in _TOTALS)


def known_facts(facts: Iterable[tuple[str, float | None, str]]) -> list[JsonDict]:
    """Return labels, numbers and their paths in the report's JSON; unknown values are left out."""
    return [
        {"label": label, "text": number_text(value), "value": value, "path": path}
        for label, value, path in facts
        if value is not None
    ]


def cards(summary: TraceSummary, path: str = "") -> list[JsonDict]:
    """Return the five main metrics.

    Args:
        path: prefix of the summary in the report's JSON.
    """
    found = [
        _moe_share(summary),
        _worst_load(summary),
        _dead_experts(summary),
        _confidence(summary),
        _speed(summary),
    ]
    return [{**card._asdict(), "path": card.path and f"{path}{card.path}"} for card in found]


def _moe_share(summary: TraceSummary) -> _Card:
    whole = summary.phases.whole if summary.phases is not None else None
    label = "MoE of the device's work" if whole is None or whole.on_device else "MoE of the host's work"
    if whole is None:
        return _Card(label, "time", _no_times(summary))
    value = whole.moe_share_of_model
    detail = "of all kernel time" if whole.on_device else "of all time in operators"
    if summary.phases is not None and summary.phases.provenance is not None:
        detail += f", {BY_COMPILER}"
    return _Card(label, "time", detail, value, share(value), "phases.whole.moe_share_of_model")


def in_graphs(summary: TraceSummary) -> bool:
    """Return whether calls ran inside CUDA graphs, where there are no ranges."""
    return bool(summary.calls.in_graph.any())


def _no_times(summary: TraceSummary) -> str:
    return "the calls ran inside CUDA graphs" if in_graphs(summary) else "no call has its ranges in the trace"


def _worst_load(summary: TraceSummary) -> _Card:
    worst = summary.most_imbalanced_layer()
    label = "most uneven layer, max÷mean"
    if worst is None:
        loads = [router.chance for router in summary.routers if sum(router.assignments)]
        reason = "no layer is more uneven than chance" if loads else "no assignment was recorded"
        if loads and all(chance.says_nothing for chance in loads):
            reason = "too few tokens to say"
        return _Card(label, "routing", reason)
    value, site = worst.load.max_over_mean, worst.info.site
    path = f"routers.{summary.routers.index(worst)}.load.max_over_mean"
    return _Card(label, "routing", f"in {site}", value, f"{number(value)}×", path, site)


def _dead_experts(summary: TraceSummary) -> _Card:
    if not any(router.chance.tells_dead for router in summary.routers):
        return _Card("dead experts", "routing", "too few tokens to say")
    dead = summary.dead_experts()
    total = sum(map(len, dead.values()))
    experts = sum(len(router.assignments) for router in summary.routers)
    detail = f"of {experts:,}, in {len(dead)} of {len(summary.routers)} layers"
    return _Card("dead experts", "routing", detail, total, number_text(total))


def _confidence(summary: TraceSummary) -> _Card:
    known = [(c, r.info.site) for r in summary.routers if (c := r.decisions.confidence_mean) is not None]
    if not known:
        return _Card("router confidence", "routing", "the trace has no logits")
    mean = sum(c for c, _ in known) / len(known)
    lowest, site = min(known)
    detail = f"lowest {number(lowest)} in {site}"
    return _Card("router confidence", "routing", detail, mean, number(mean))


def _speed(summary: TraceSummary) -> _Card:
    if summary.phases is None:
        return _Card("expert FLOP/s", "time", _no_times(summary))
    rate = summary.speed.experts if summary.speed is not None else None
    value, peak = (rate.flops_per_s, rate.share_of_peak) if rate is not None else (None, None)
    detail = f"{share(peak)} of the device's peak" if peak is not None else "the device's peak is not known"
    if value is None and summary.experts_are_split:
        detail = "experts are split over ranks"
    path = "speed.experts.flops_per_s"
    return _Card("expert FLOP/s", "time", detail, value, scaled(value, "FLOP/s"), path)
