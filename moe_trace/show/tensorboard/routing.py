"""Assignment counts of any range of steps, and facts about one layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.calls.table import load_by_step
from moe_trace.data.summary import RouterSummary
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.figures.expert_heat_map import LOAD_HEADINGS, equal_share_row, load_row
from moe_trace.show.tensorboard.overview import known_facts
from moe_trace.show.tensorboard.to_json import JsonDict, plain_table


class StepCounts:
    """Cumulative assignments over steps, so that any range of steps is one subtraction."""

    def __init__(self, summary: TraceSummary) -> None:
        routers = loaded_routers(summary)
        self.sizes = [len(router.assignments) for router in routers]
        self.width = max(self.sizes, default=0)
        names = [router.info.name for router in routers]
        self.steps, counts_SLE = load_by_step(summary.calls, names, least=self.width)
        zeros = np.zeros((1, *counts_SLE.shape[1:]), np.int64)
        self._sums = np.concatenate([zeros, counts_SLE]).cumsum(0)

    def between(self, first: int, last: int) -> list[np.ndarray]:
        """Return the assignments of each layer from the first to the last position, both included."""
        chosen = self._sums[last + 1] - self._sums[first]
        return [row[:size] for row, size in zip(chosen, self.sizes, strict=True)]


def loaded_routers(summary: TraceSummary) -> list[RouterSummary]:
    """Return the routers that assigned anything."""
    return [router for router in summary.routers if sum(router.assignments)]


def heat(routers: Sequence[RouterSummary], counts: StepCounts, first: int, last: int) -> JsonDict:
    """Return the heat map's numbers and its table, from the first to the last position of the steps."""
    layers = list(zip(routers, counts.between(first, last), strict=True))
    rows = [load_row(router.info.site, int(load_E.sum()), load_E) for router, load_E in layers]
    return {
        "z": [equal_share_row(load_E, counts.width) for _, load_E in layers],
        "table": plain_table(("layer", "assignments", *LOAD_HEADINGS), rows),
    }


def layer_facts(router: RouterSummary, place: str) -> list[JsonDict]:
    """Return a layer's metrics over all steps, with their paths in the report's JSON."""
    load, decisions = router.load, router.decisions
    numbers: dict[str, tuple[float | None, str]] = {
        "calls": (router.calls, "calls"),
        "tokens": (router.tokens, "tokens"),
        "max÷mean": (load.max_over_mean, "load.max_over_mean"),
        "CV": (load.cv, "load.cv"),
        "Gini": (load.gini, "load.gini"),
        "entropy": (load.entropy, "load.entropy"),
        "router entropy": (decisions.entropy_mean, "router.entropy_mean"),
        "router confidence": (decisions.confidence_mean, "router.confidence_mean"),
        "skipped": (router.skipped, "skipped"),
        "padding": (router.padding_assignments, "padding_assignments"),
    }
    return known_facts((label, value, f"{place}.{path}") for label, (value, path) in numbers.items())
