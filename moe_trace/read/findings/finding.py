"""What a rule looks at, and what it says."""

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
"""How many a page shows; the JSON has all."""
LAYERS_NAMED = 3
WRONG = frozenset({"nonfinite", "experts_untimed", "bytes_differ", "clocks_disagree"})
Severity = Literal["wrong", "time", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence that says what was found, and one that says what to do."""

    rule: str = ""
    """The name of the function that found it, which `find` fills in."""
    site: str | None = None
    """The layer with the worst value; None where it is about no single layer."""
    value: float
    """The worst."""
    threshold: float
    sentence: str
    advice: str
    sites: tuple[str, ...] = ()
    """All layers it holds for, worst first."""
    cost_us: float | None = None
    """Time that it takes over the whole recording, where the trace tells."""
    stage: Stage | None = None
    """The calls that it is about; None where the recording has one stage only, or for the run as a whole."""

    @property
    def severity(self) -> Severity:
        """`wrong` where figures cannot be trusted, `time` where it takes time that the trace tells."""
        if self.rule in WRONG:
            return "wrong"
        return "time" if self.cost_us is not None else "note"

    @property
    def price(self) -> str:
        """Severity in a word: `wrong`, the time that it takes, or `note`."""
        return (
            duration(self.cost_us) if self.severity == "time" and self.cost_us is not None else self.severity
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Evidence(Summary):
    """What the rules look at: a summary, with what the events of the trace tell of the same calls."""

    phases: PhaseReport | None
    """None where no call has its ranges in the trace."""
    speed: SpeedReport | None
    imbalance: tuple[ImbalanceCost, ...]
    load_models: tuple[LoadModel, ...]
    """How the experts' time follows the load: what `imbalance` rests on."""
    operators: frozenset[str] = field(repr=False)
    """Names of torch's operators in the trace."""
    ranks: RankReport | None = None
    """The ranks of the run together; None for a single one."""
    distinct: DistinctReport | None = None
    """Experts that a forward reads, by its tokens; of all stages together, None in those without decode."""
    stage: Stage | None = None
    """That of all calls; None where they are of several."""


Rule = Callable[[Evidence], Iterator[Finding]]


def in_one_line(layers: Sequence[tuple[str, str]]) -> str:
    """`L04 8.0×, L05 7.9×, L08 7.9× and 12 more layers`, from (site, figure), worst first."""
    named = ", ".join(f"{site} {figure}".rstrip() for site, figure in layers[:LAYERS_NAMED])
    more = len(layers) - LAYERS_NAMED
    return named if more <= 0 else f"{named} and {count(more, 'more layer')}"


def count(number: int, noun: str) -> str:
    """`1 expert`, `2 experts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: float) -> str:
    """A share for a sentence: no decimals, or one where it is under 10 % and no whole number."""
    value = 100 * part
    return f"{value:.0f} %" if value >= 9.5 or abs(value - round(value)) < 0.05 <= value else f"{value:.1f} %"


def duration(us: float) -> str:
    """`340 µs`, `12.4 ms`."""
    if abs(us) >= 1e6:
        return f"{us / 1e6:.3g} s"
    return f"{us / 1e3:.3g} ms" if abs(us) >= 1e3 else f"{us:.3g} µs"
