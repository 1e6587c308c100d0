"""The cost of uneven load in this set-up, as text."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.display.columns import text_table
from moe_trace.data.display.tables import number, paragraph, share
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.time.imbalance import ImbalanceCost, LoadModel, slopes_in_words

_COMPARISONS = {
    "forwards and layers": "calls of the same layer and of the same forward are compared",
    "forwards": "the layers of one forward are compared, taken as alike",
    "ranks": "the ranks of one call are compared",
    "trend": "calls are compared after the number of tokens and a drift over the steps are taken out",
}


def imbalance_part(summary: TraceSummary) -> list[str]:
    """Render a sentence on the evidence per model, and a table of the layers with a verdict."""
    if not summary.imbalance:
        return []
    lines = [paragraph(_sentence(model)) for model in summary.load_models]
    known = [cost for cost in summary.imbalance if cost.verdict != "cannot tell"]
    ranks = any(model.comparison == "ranks" for model in summary.load_models)
    return ["\n".join(lines + ([_table(known, ranks=ranks)] if known else []))]


def _sentence(model: LoadModel) -> str:
    if model.verdict == "cannot tell":
        return f"Cost of imbalance: cannot tell ({model.reason})."
    if model.verdict == "no effect seen":
        return "Cost of imbalance: no effect on the experts' time is seen."
    meaning = {
        "costs": "The busiest rank takes longer than the mean one"
        if model.comparison == "ranks"
        else "Uneven load costs time here",
        "saves": "Uneven load saves time here: fewer experts' weights are read. Even load would cost it",
    }[model.verdict]
    compared = _COMPARISONS[model.comparison or "trend"]
    return (
        f"Cost of imbalance: the experts take {slopes_in_words(model)} ({compared}; "
        f"that explains {share(model.held_out_r2)} of the variation in time of held-out calls). {meaning}."
    )


def _table(costs: Sequence[ImbalanceCost], *, ranks: bool) -> str:
    rows = [
        (
            *(cost.site, cost.measured_us, cost.equal_load_us, cost.cost_us),
            f"{number(cost.low_us)} to {number(cost.high_us)}",
            "most even" if cost.cost_us == 0 else cost.verdict,
        )
        for cost in costs
    ]
    against = "mean rank" if ranks else "at most even"
    title = "Experts' time of one forward call in µs, and at the most even load of the trace"
    if ranks:
        title = "Experts' time of one forward call on its busiest rank in µs, and of a mean rank"
    headings = ("layer", "measured", against, "cost", "95 % interval", "verdict")
    return text_table(headings, rows, title=title)
