"""Differences in the set-up of two recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_trace.read.analysis import TraceSummary

NOT_RECORDED = "not recorded"
_MODEL_KEYS = {
    "name": "model",
    "class": "model class",
    "num_layers": "layers",
    "num_moe_layers": "MoE layers",
    "num_parameters": "parameters",
    "hidden_size": "hidden size",
    "dtype": "dtype",
    "device": "device of the weights",
    "experts_implementation": "experts implementation",
    "attention_implementation": "attention implementation",
    "training": "training mode",
}
WORK_TOLERANCE = 0.1
"""Relative difference of tokens per call below which calls are of the same size."""


@dataclass(frozen=True, kw_only=True)
class SetupChange:
    """A property of the set-up that differs."""

    fact: str
    a: str
    b: str


def setup_changes(a: TraceSummary, b: TraceSummary) -> tuple[SetupChange, ...]:
    """Return the properties that differ, most important first; missing ones are `NOT_RECORDED`."""
    facts_a, facts_b = dict(_facts(a)), dict(_facts(b))
    found = []
    for fact in dict.fromkeys([*facts_a, *facts_b]):
        value_a, value_b = facts_a.get(fact), facts_b.get(fact)
        if value_a == value_b or (fact.startswith("config.") and None in (value_a, value_b)):
            continue  # older recordings contain no config, and the keys depend on the class
        found.append(SetupChange(fact=fact, a=_fact_text(value_a), b=_fact_text(value_b)))
    return (*found, *_work(a, b))


def clock_problem(a: TraceSummary, b: TraceSummary) -> str | None:
    """Return why the times of two recordings cannot be compared, or None if they can."""
    clocks = ["none" if s.times is None else "device" if s.times.on_device else "host" for s in (a, b)]
    if clocks[0] == clocks[1] or "none" in clocks:
        return None
    return (
        f"Times are not compared: those of A are {clocks[0]} time and those of B {clocks[1]} time. "
        "Record both with the same activities, on the same kind of device."
    )


def _fact_text(value: Any) -> str:
    if value is None:
        return NOT_RECORDED
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _facts(summary: TraceSummary) -> Iterator[tuple[str, Any]]:
    model = summary.model
    for key, words in _MODEL_KEYS.items():
        if model.get(key) is not None:
            yield words, model[key]
    yield "device", summary.speed.device if summary.speed is not None else None
    for words, attribute in (("experts", "num_experts"), ("top-k", "top_k"), ("read as", "contract")):
        yield words, _only_value({str(getattr(r.info, attribute)) for r in summary.routers})
    config = model.get("config")
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"config.{key}", value
    yield "ranks", max(1, len(summary.rank_inputs))
    for package, version in summary.versions.items():
        yield f"version of {package}", version
    for option in ("layers", "every", "warmup"):
        yield f"tracer's {option}", str(summary.options.get(option))
    yield "stages", ", ".join(summary.by_stage()) or "none"
    yield "graph or compiled", any(s.in_graph for s in summary.samples)
    if summary.phases is not None:
        yield "phases told", "by ranges" if summary.phases.provenance is None else "by the compiler"


def _only_value(values: set[str]) -> str | None:
    return " and ".join(sorted(values)[:4]) or None


def _work(a: TraceSummary, b: TraceSummary) -> Iterator[SetupChange]:
    stages_b = b.by_stage()
    for stage, part in a.by_stage().items():
        if stage in stages_b:
            sizes = [_tokens(part), _tokens(stages_b[stage])]
            if max(sizes) > (1 + WORK_TOLERANCE) * min(sizes):
                yield SetupChange(fact=f"tokens a call, {stage}", a=f"{sizes[0]:,.0f}", b=f"{sizes[1]:,.0f}")


def _tokens(summary: TraceSummary) -> float:
    return float(np.mean([s.tokens for s in summary.samples])) if summary.samples else 0.0
