"""Conditions that fail a comparison, such as `device_busy_p50>+5%`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_trace.data.errors import UsageError
from moe_trace.read.diff.comparison import Change
from moe_trace.read.diff.metrics import METRICS

_CONDITION = re.compile(
    r"(?:(?P<site>[^:<>]+):)?(?P<metric>\w+)(?P<sign>[<>])(?P<number>[+-]?\d+(?:\.\d+)?)(?P<percent>%?)"
)


@dataclass(frozen=True)
class Condition:
    """A condition such as `device_busy_p50>+5%`, which fails where the change is real and larger."""

    text: str
    site: str
    metric: str
    above: bool
    threshold: float
    relative: bool

    def fails(self, change: Change) -> bool:
        """Return whether the condition forbids this change; noise never fails."""
        if (change.site, change.metric) != (self.site, self.metric):
            return False
        if change.verdict not in ("changed", "host", "few calls") or change.difference == 0:
            return False
        size = change.relative if self.relative else change.difference
        if size is None:
            size = float("inf") if change.difference > 0 else float("-inf")
        return size > self.threshold if self.above else size < self.threshold


def parse_condition(text: str) -> Condition:
    """Parse a condition such as `[LAYER:]METRIC>+5%` or `METRIC<-0.1`.

    Raises:
        UsageError: The text has another form, or names an unknown metric.
    """
    match = _CONDITION.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UsageError(f"found --fail-on {text!r}, expected a condition such as 'device_busy_p50>+5%'")
    if match["metric"] not in METRICS:
        raise UsageError(f"found the unknown metric {match['metric']!r}; known are {', '.join(METRICS)}")
    relative = bool(match["percent"])
    return Condition(
        text=text,
        site=match["site"] or "all",
        metric=match["metric"],
        above=match["sign"] == ">",
        threshold=float(match["number"]) / (100 if relative else 1),
        relative=relative,
    )


def missing(condition: Condition, changes: Sequence[Change]) -> bool:
    """Return whether no change has the condition's layer and metric, so that the check could never fail."""
    return all((c.site, c.metric) != (condition.site, condition.metric) for c in changes)
