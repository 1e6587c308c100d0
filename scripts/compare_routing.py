#!/usr/bin/env python3
"""Compare loss and experts per token of the demo model under each ready-made routing rule.

    python scripts/compare_routing.py
    python scripts/compare_routing.py --device cuda --markdown table.md

The text is the demo's prompts, which the model was not trained on. Losses are in nats per byte. `k` is the
number of experts that a token really used, `computed` the number of slots per token whose expert ran. A
skipped slot still runs its expert unless the rule returns fewer slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_trace import MoEProfiler, replace_router
from moe_trace.data.display.tables import table
from moe_trace.demo import DEMO_PROMPTS, load_demo_model
from moe_trace.routing import (
    Renormalise,
    RoutingRule,
    confidence_threshold,
    cumulative_mass,
    drop_over_capacity,
    top_k,
)

HEADINGS = ("rule", "rest", "k", "computed", "skipped", "loss", "change", *DEMO_PROMPTS)


@dataclass(frozen=True)
class Outcome:
    """Result of one rule. Losses are in nats per byte: the mean over all bytes, and per prompt."""

    rule: str
    renormalise: str
    k_mean: float
    computed_per_token: float
    skipped_share: float
    loss: float
    losses: dict[str, float]


def rules() -> Iterator[tuple[str, RoutingRule, Renormalise]]:
    """Yield the rules of the table, from strong to weak within each kind."""
    for k in (1, 2, 3, 4, 6, 8):
        yield f"top_k({k})", top_k(k), "none"
    for k in (1, 2, 3):
        yield f"top_k({k})", top_k(k), "original"
    for p in (0.3, 0.4, 0.5, 0.6):
        yield f"cumulative_mass({p})", cumulative_mass(p), "none"
    for p in (0.2, 0.1, 0.05):
        yield f"confidence_threshold({p})", confidence_threshold(p), "none"
    for c in (0.5, 1.0, 1.5):
        yield f"drop_over_capacity({c})", drop_over_capacity(c), "none"


def compare(model: Any, tokenizer: Any) -> list[Outcome]:
    """Measure the model as trained, then under every rule."""
    outcomes = [measure(model, tokenizer, "as trained", None, "none")]
    for name, rule, renormalise in rules():
        outcomes.append(measure(model, tokenizer, name, rule, renormalise))
    return outcomes


def measure(
    model: Any, tokenizer: Any, name: str, rule: RoutingRule | None, renormalise: Renormalise
) -> Outcome:
    """Measure loss and routing over the prompts under one rule."""
    losses, lengths = {}, {}
    active: Any = nullcontext() if rule is None else replace_router(model, rule, renormalise=renormalise)
    with torch.no_grad(), active, MoEProfiler(model) as profiler:
        for domain, text in DEMO_PROMPTS.items():
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
            losses[domain] = float(model(input_ids=ids, labels=ids).loss)
            lengths[domain] = ids.shape[1] - 1
    samples = [s for metrics in profiler.get_metrics().values() for s in metrics.samples]
    tokens, slots = sum(s.tokens for s in samples), sum(s.tokens * s.top_k for s in samples)
    return Outcome(
        rule=name,
        renormalise=renormalise if rule is not None else "",
        k_mean=sum(int(s.assignments.sum()) for s in samples) / tokens,
        computed_per_token=sum(s.computed_slots for s in samples) / tokens,
        skipped_share=sum(s.skipped for s in samples) / slots,
        loss=sum(losses[d] * lengths[d] for d in losses) / sum(lengths.values()),
        losses=losses,
    )


def cells(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return the rows of the table; `change` is relative to the model as trained."""
    base = outcomes[0].loss
    return [
        [
            o.rule,
            o.renormalise,
            f"{o.k_mean:.2f}",
            f"{o.computed_per_token:.2f}",
            f"{o.skipped_share:.1%}",
            f"{o.loss:.3f}",
            f"{o.loss - base:+.3f}",
            *(f"{loss:.3f}" for loss in o.losses.values()),
        ]
        for o in outcomes
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    rows = cells(compare(*load_demo_model(arguments.device)))
    print(table(HEADINGS, rows, left=2))
    if arguments.markdown is not None:
        lines = [list(HEADINGS), ["---"] * len(HEADINGS), *rows]
        arguments.markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
