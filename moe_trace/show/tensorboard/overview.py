"""The Overview: facts, cards, and the report's findings, worst first, each with the view that shows it."""

from __future__ import annotations

from collections.abc import Sequence

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
"""Every other rule is about the routing."""


def path_of(stage: str | None) -> str:
    """Where the stage's figures stand in the report's JSON: `` or `stages.prefill.`."""
    return f"stages.{stage}." if stage else ""


def overview(summary: TraceSummary) -> JsonDict:
    """What the first page shows of one trace: each of its stages, one after the other."""
    stages: dict[str, TraceSummary] = {str(k): part for k, part in summary.stages.items()} or {"": summary}
    apart = summary.findings_apart()
    return {
        "stages": [_stage(stage, part, apart[stage]) for stage, part in stages.items()],
        "of_run": _findings(apart[""] if summary.stages else ()),
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
    shown = [_finding(finding) for finding in found[:FINDINGS_MAX]]
    return {"shown": shown, "more": max(0, len(found) - FINDINGS_MAX)}


def _finding(finding: Finding) -> JsonDict:
    entries = attributes(finding, "rule", "severity", "price", "site", "sentence", "advice")
    return {**entries, "view": VIEW_OF_RULE.get(finding.rule, "routing")}


def facts(summary: TraceSummary) -> list[JsonDict]:
    """What was recorded: texts, and numbers with their place in the report's JSON."""
    model, totals, speed = summary.model, summary.totals, summary.speed
    device = speed.device if speed is not None and speed.device else model.get("device")
    plain = [
        ("model", model_name(model)),
        ("device", device or "unknown"),
        ("type", model.get("dtype") or "unknown"),
    ]
    counted: list[tuple[str, str, float]] = [
        ("MoE layers", "totals.routers", totals.routers),
        ("steps", "totals.steps", totals.steps),
        ("calls", "totals.calls", totals.calls),
        ("tokens", "totals.tokens", totals.tokens),
        ("assignments", "totals.assignments", totals.assignments),
        ("skipped", "totals.skipped", totals.skipped),
        ("padding", "totals.padding_assignments", totals.padding_assignments),
    ]
    if totals.requests_per_forward is not None:
        counted.append(("requests a forward", "totals.requests_per_forward", totals.requests_per_forward))
    found: list[JsonDict] = [{"label": label, "text": str(text)[:200]} for label, text in plain]
    found += [
        {"label": label, "text": number_text(value), "value": value, "path": path}
        for label, path, value in counted
    ]
    return found


def cards(summary: TraceSummary, path: str = "") -> list[JsonDict]:
    """The five figures to look at first; None where the trace does not tell.

    Args:
        path: where the summary stands in the report's JSON.
    """
    found = [_moe_share(summary), _worst_load(summary), _dead(summary), _confidence(summary), _speed(summary)]
    return [{**card, "path": card["path"] and f"{path}{card['path']}"} for card in found]


def _card(
    label: str,
    text: str,
    value: float | None,
    path: str | None,
    detail: str,
    view: str,
    site: str | None = None,
) -> JsonDict:
    card: JsonDict = {"label": label, "text": text, "value": value, "path": path, "detail": detail}
    return {**card, "view": view, "site": site}


def _moe_share(summary: TraceSummary) -> JsonDict:
    whole = summary.phases.whole if summary.phases is not None else None
    label = "MoE of the device's work" if whole is None or whole.on_device else "MoE of the host's work"
    if whole is None:
        return _card(label, "-", None, None, _no_times(summary), "time")
    value = whole.moe_share_of_model
    detail = "of all kernel time" if whole.on_device else "of all time in operators"
    if summary.phases is not None and summary.phases.provenance is not None:
        detail += f", {BY_COMPILER}"
    return _card(label, share(value), value, "phases.whole.moe_share_of_model", detail, "time")


def in_graphs(summary: TraceSummary) -> bool:
    """Whether calls ran inside CUDA graphs, where there are no ranges."""
    return bool(summary.calls.in_graph.any())


def _no_times(summary: TraceSummary) -> str:
    return "the calls ran inside CUDA graphs" if in_graphs(summary) else "no call has its ranges in the trace"


def _worst_load(summary: TraceSummary) -> JsonDict:
    worst = summary.most_imbalanced_layer()
    label = "most uneven layer, max÷mean"
    if worst is None:
        loads = [router.chance for router in summary.routers if sum(router.assignments)]
        why = "no layer is more uneven than chance" if loads else "no assignment was recorded"
        if loads and all(chance.says_nothing for chance in loads):
            why = "too few tokens to say"
        return _card(label, "-", None, None, why, "routing")
    value = worst.load.max_over_mean
    index = summary.routers.index(worst)
    path = f"routers.{index}.load.max_over_mean"
    site = worst.info.site
    return _card(label, f"{number(value)}×", value, path, f"in {site}", "routing", site)


def _dead(summary: TraceSummary) -> JsonDict:
    if not any(router.chance.tells_dead for router in summary.routers):
        return _card("dead experts", "-", None, None, "too few tokens to say", "routing")
    dead = summary.dead_experts()
    total = sum(map(len, dead.values()))
    experts = sum(len(router.assignments) for router in summary.routers)
    detail = f"of {experts:,}, in {len(dead)} of {len(summary.routers)} layers"
    return _card("dead experts", number_text(total), total, None, detail, "routing")


def _confidence(summary: TraceSummary) -> JsonDict:
    known = [(c, r.info.site) for r in summary.routers if (c := r.decisions.confidence_mean) is not None]
    if not known:
        return _card("router confidence", "-", None, None, "the trace has no logits", "routing")
    mean = sum(c for c, _ in known) / len(known)
    lowest, site = min(known)
    return _card(
        "router confidence", number(mean), mean, None, f"lowest {number(lowest)} in {site}", "routing"
    )


def _speed(summary: TraceSummary) -> JsonDict:
    rate = summary.speed.experts if summary.speed is not None else None
    value = rate.flops_per_s if rate is not None else None
    if summary.phases is None:
        return _card("expert FLOP/s", "-", None, None, _no_times(summary), "time")
    peak = rate.share_of_peak if rate is not None else None
    detail = f"{share(peak)} of the device's peak" if peak is not None else "the device's peak is not known"
    if value is None and summary.experts_are_split:
        detail = "experts are split over ranks"
    return _card("expert FLOP/s", scaled(value, "FLOP/s"), value, "speed.experts.flops_per_s", detail, "time")
