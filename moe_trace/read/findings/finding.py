"""Findings, the evidence that rules examine, and formatting helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moe_trace.data.schema import Stage
from moe_trace.data.summary import Summary
from moe_trace.read.experts.distinct import DistinctReport
from moe_trace.read.time.imbalance import ImbalanceCost, LoadModel
from moe_trace.read.time.layers import PhaseReport
from moe_trace.read.time.speed import SpeedReport

if TYPE_CHECKING:
    from moe_trace.read.ranks.report import RankReport

FINDINGS_SHOWN = 8
"""Number of findings that a page shows; the JSON contains all."""
LAYERS_NAMED = 3
WRONG = frozenset({"nonfinite", "experts_untimed", "bytes_differ", "clocks_disagree"})
Severity = Literal["wrong", "time", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence with what was found, and one with what to do."""

    rule: str = ""
    """Name of the function that found it, filled in by `find`."""
    site: str | None = None
    """Layer with the worst value, or None if it is not about a single layer."""
    value: float
    """The worst value."""
    threshold: float
    sentence: str
    advice: str
    sites: tuple[str, ...] = ()
    """All layers that it applies to, worst first."""
    cost_us: float | None = None
    """Time lost over the whole recording, if known from the trace."""
    stage: Stage | None = None
    """Stage of the calls; None for a recording with one stage, or for the run as a whole."""

    @property
    def severity(self) -> Severity:
        """`wrong` if figures cannot be trusted, `time` if the time lost is known, else `note`."""
        if self.rule in WRONG:
            return "wrong"
        return "time" if self.cost_us is not None else "note"

    @property
    def price(self) -> str:
        """Text that shows the severity: `wrong`, the time lost, or `note`."""
        return (
            duration(self.cost_us) if self.severity == "time" and self.cost_us is not None else self.severity
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Evidence(Summary):
    """A summary with results from the trace's events, which the rules examine."""

    phases: PhaseReport | None
    """Time by phase, or None if no call has its ranges in the trace."""
    speed: SpeedReport | None
    imbalance: tuple[ImbalanceCost, ...]
    load_models: tuple[LoadModel, ...]
    """Models of the experts' time as a function of the load, the basis of `imbalance`."""
    operators: frozenset[str] = field(repr=False)
    """Names of torch's operators in the trace."""
    ranks: RankReport | None = None
    """Report on the ranks of the run, or None for a single rank."""
    distinct: DistinctReport | None = None
    """Distinct experts per forward by its tokens, over all stages; None for stages without decode."""
    stage: Stage | None = None
    """Stage of all calls, or None if there are several."""


Rule = Callable[[Evidence], Iterator[Finding]]


def in_one_line(layers: Sequence[tuple[str, str]]) -> str:
    """Format (site, figure) pairs, worst first: `L04 8.0×, L05 7.9×, L08 7.9× and 12 more layers`."""
    listed = ", ".join(f"{site} {figure}".rstrip() for site, figure in layers[:LAYERS_NAMED])
    remaining = len(layers) - LAYERS_NAMED
    return listed if remaining <= 0 else f"{listed} and {count(remaining, 'more layer')}"


def count(number: int, noun: str) -> str:
    """Format a number with its noun, such as `1 expert` or `2 experts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: float) -> str:
    """Format a share without decimals, or with one if it is under 10 % and not a whole number."""
    value = 100 * part
    return f"{value:.0f} %" if value >= 9.5 or abs(value - round(value)) < 0.05 <= value else f"{value:.1f} %"


def duration(us: float) -> str:
    """Format a duration, such as `340 µs` or `12.4 ms`."""
    if abs(us) >= 1e6:
        return f"{us / 1e6:.3g} s"
    return f"{us / 1e3:.3g} ms" if abs(us) >= 1e3 else f"{us:.3g} µs"
