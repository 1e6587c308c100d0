"""What a rule looks at, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe_trace.data.summary import RouterSummary
from moe_trace.read.ranks.ranks import RankReport
from moe_trace.read.time.imbalance import ImbalanceCost
from moe_trace.read.time.layers import PhaseReport
from moe_trace.read.time.speed import SpeedReport


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence that says what was found, and one that says what to do."""

    rule: str
    site: str | None
    value: float
    threshold: float
    sentence: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules look at."""

    routers: Sequence[RouterSummary]
    phases: PhaseReport | None
    speed: SpeedReport | None
    imbalance: Sequence[ImbalanceCost]
    operators: frozenset[str]
    """Names of the operators in the trace."""
    ranks: RankReport | None = None
    """None for a single rank."""


Rule = Callable[[Evidence], Iterator[Finding]]
