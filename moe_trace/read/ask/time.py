"""Answers about time: the share of MoE, and the time that balance would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_trace.read.analysis import TraceSummary
from moe_trace.read.ask.answer import each, multiplied, steps_and_tokens
from moe_trace.read.findings.finding import duration, percent
from moe_trace.read.time.imbalance import ImbalanceCost, saved_by
from moe_trace.read.time.layers import PASSES, Pass, PhaseReport

_PARTS: dict[str, tuple[Pass, ...]] = {
    "forward": ("forward",),
    "recompute": ("recompute",),
    "backward alone": ("backward",),
    "backward": ("recompute", "backward"),
    "all": PASSES,
}


def shares(part: TraceSummary) -> dict[str, Any]:
    """Report MoE's and the router's share of each pass, and their time per step, token and call."""
    report = part.phases
    if report is None or report.whole.moe_work_us is None:
        return {
            "sentence": "Cannot tell: the trace does not show how long the MoE layers took (see its Notes)."
        }
    rows = [_share_row(name, _PARTS[name], report, part) for name in _parts(report)]
    clock = "busy device time" if report.whole.on_device else "time in operators"
    model, router = rows[-1]["moe_of_model"], rows[-1]["router_of_moe"]
    sentence = f"MoE is {percent(model)} of the model's {clock}; " if model is not None else ""
    sentence += f"the router is {percent(router or 0.0)} of MoE"
    if model is not None:
        sentence += f" and {percent(model * (router or 0.0))} of the model"
    sentence += f". MoE takes {each(report.whole.moe_work_us, part)}"
    sentence += f", {duration(rows[-1]['us_per_call'])} a layer and call; the router of that"
    sentence += (
        f" {each(rows[-1]['router_us'], part)}, {duration(rows[-1]['router_us_per_call'])} a layer and call."
    )
    if model is None:
        sentence += " What the rest of the model took cannot be separated here: record with prof.step()."
    if report.whole.moe_share_of_step is not None:
        sentence += (
            f" On the host its blocks take {percent(report.whole.moe_share_of_step)} of the profiler's steps."
        )
    found = report.provenance
    if found is not None:
        sentence += f" Inside compiled code these times are {found}."
    figures = {
        "clock": clock,
        "moe_of_step": report.whole.moe_share_of_step,
        **({"by_the_compilers_provenance": asdict(found)} if found is not None else {}),
    }
    return {"sentence": sentence, "figures": figures, "rows": tuple(rows)}


def _share_row(name: str, passes: Sequence[Pass], report: PhaseReport, part: TraceSummary) -> dict[str, Any]:
    times = [time for pass_ in passes if (time := report.total.phases_of(pass_))]
    us = {
        phase: sum(report.work_us(time[phase]) for time in times)
        for phase in dict.fromkeys(phase for time in times for phase in time)
    }
    total, router = sum(us.values()), us.get("router", 0.0)
    whole = report.whole
    # The model's recomputation outside MoE is part of its backward pass and cannot be separated from it.
    model_us = {
        "forward": whole.model_forward_us,
        "backward": whole.model_backward_us,
        "all": whole.model_work_us,
    }.get(name)
    calls = report.total.count("forward" if name == "all" else passes[-1])
    return {
        "part": name,
        "passes": [pass_ for pass_ in passes if report.total.phases_of(pass_)],
        "moe_of_model": total / model_us if model_us else None,
        "router_of_model": router / model_us if model_us else None,
        "router_of_moe": router / total if total else None,
        "us": total,
        **multiplied(total, part),
        "us_per_call": total / calls if calls else None,
        "router_us": router,
        **{f"router_{name}": value for name, value in multiplied(router, part).items()},
        "router_us_per_call": router / calls if calls else None,
    }


def _parts(report: PhaseReport) -> list[str]:
    found = report.passes()
    recompute = ["recompute", "backward alone"] if "recompute" in found else []
    return ["forward", *recompute, "backward", "all"] if "backward" in found or recompute else ["all"]


def balance(part: TraceSummary) -> dict[str, Any]:
    """Estimate the time that even loads of the experts would save, where the trace allows it."""
    known_costs = [cost for cost in part.imbalance if cost.cost_us is not None]
    waiting = _waiting(part)
    if not known_costs:
        reason = next(
            (cost.reason for cost in part.imbalance if cost.reason), "the trace has no times of experts"
        )
        return {"sentence": f"Cannot tell: {reason}.{waiting}"}
    low, cost, high = (_sum_over_calls(known_costs, name) for name in ("low_us", "cost_us", "high_us"))
    work = part.phases.whole.moe_work_us if part.phases is not None else None
    figures = {
        "cost_us": cost,
        "low_us": low,
        "high_us": high,
        **multiplied(cost, part),
        "of_moe": cost / work if work else None,
    }
    steps, _ = steps_and_tokens(part)
    interval = f"95 % interval {duration(low / steps)} to {duration(high / steps)} a step"
    of_moe = f", {percent(abs(cost) / work)} of MoE's work" if work else ""
    if low <= 0 <= high:
        sentence = f"Nothing that the trace shows: {each(cost, part)} ({interval})."
    elif cost > 0:
        worst = max(known_costs, key=lambda layer_cost: layer_cost.cost_us or 0.0)
        sentence = (
            f"At most {each(cost, part)}{of_moe} ({interval}): the forward calls' experts, if each load were "
            f"as even as the evenest of the trace. Most in {worst.site}, {duration(worst.cost_us or 0.0)} a "
            "call."
        )
    else:
        sentence = (
            f"Nothing: it would cost {each(-cost, part)}{of_moe}, were each load as even as the evenest of "
            f"the trace. Here {saved_by(part.load_models)}"
        )
    rows = tuple(
        {"layer": one.site, "us_per_call": one.cost_us, "low_us": one.low_us, "high_us": one.high_us}
        for one in known_costs
    )
    return {"sentence": sentence + waiting, "figures": figures, "rows": rows}


def _sum_over_calls(costs: Sequence[ImbalanceCost], name: str) -> float:
    """Sum over all calls. The layers share one fit, so their errors add up and no interval is too narrow."""
    return sum((getattr(cost, name) or 0.0) * cost.calls for cost in costs)


def _waiting(part: TraceSummary) -> str:
    ranks = part.ranks
    if ranks is None or not ranks.wait_us:
        return ""
    of = f", {percent(ranks.wait_share)} of their time" if ranks.wait_share is not None else ""
    return f" The ranks wait {each(ranks.wait_us, part)} for each other in the MoE layers{of}."
