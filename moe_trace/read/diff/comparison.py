"""Compare two recordings in set-up, routing and time, and distinguish real changes from noise.

Stages are compared separately, and layers are strata (`metrics.py`). A metric changed if its interval
excludes 0, or, for a time on the host's clock, every change up to `HOST_FLOOR`. The intervals for all metrics
of all layers together hold jointly at 99 %, and so do those of single layers and those of the routing
(`routing.py`). `docs/reading.md` reports how often runs of the same thing are called changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_trace.data.display.notebook import ShownInNotebooks
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.diff.metrics import HOST_FLOOR, QUANTILES, Side, estimates, side_of
from moe_trace.read.diff.resampling import UNITS_MIN, Estimate, interval
from moe_trace.read.diff.routing import RoutingChange, Shared, compare_routing
from moe_trace.read.diff.setup import SetupChange, clock_problem, setup_changes

LEVEL = 0.99
Verdict = Literal["same", "changed", "host", "noise", "few calls"]
"""`host` is a change of the host's pace on a device whose own work did not change."""
_HOST_METRICS = ("host_p50", "host_p95", "device_span_p50", "block_p50")
"""Metrics that, on a device, depend on how fast the host launches and on gaps between kernels."""
_HOST = (
    "host: the host launched at another pace, while the kernels took as long as before. Two runs of the same "
    "thing differ so; it is not called a change."
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one layer (`all` for all layers) in A and in B."""

    site: str
    metric: str
    a: float
    b: float
    low: float | None
    """Lower end of the 99 % interval of b - a for all metrics jointly; None with too few steps."""
    high: float | None
    verdict: Verdict
    stage: str
    floor: float = 0.0
    """Relative change up to which two runs are not distinguished, regardless of the interval."""

    @property
    def difference(self) -> float:
        """Difference b - a."""
        return self.b - self.a

    @property
    def relative(self) -> float | None:
        """Relative change (b - a) / |a|, or None if a is 0."""
        return self.difference / abs(self.a) if self.a else None


@dataclass(frozen=True, kw_only=True)
class Comparison(ShownInNotebooks):
    """Comparison of two recordings A and B."""

    a: str
    b: str
    setup: tuple[SetupChange, ...]
    routing: tuple[RoutingChange, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    """Parts that could not be compared, with reasons, and caveats."""

    def __repr__(self) -> str:
        return (
            f"<Comparison of {self.a} and {self.b}: {len(self.setup)} facts of the set-up, "
            f"{len(self.changed_routing)} layers' routing, {len(self.changed_metrics)} figures changed>"
        )

    @property
    def unchanged(self) -> bool:
        """Whether nothing differs beyond noise; too few steps to decide are not a change."""
        return not (self.setup or self.changed_routing or self.changed_metrics)

    @property
    def changed_routing(self) -> tuple[RoutingChange, ...]:
        """Layers whose distribution over experts changed beyond chance."""
        return tuple(change for change in self.routing if change.changed)

    @property
    def changed_metrics(self) -> tuple[Change, ...]:
        """Metrics that changed beyond noise."""
        return tuple(change for change in self.changes if change.verdict == "changed")


def compare(
    a: TraceSummary, b: TraceSummary, *, only: str | None = None, host_floor: float = HOST_FLOOR
) -> Comparison:
    """Compare B with A, each stage of the model's work separately.

    Args:
        only: Label of a router, or `all`; metrics of other layers are not reported.
        host_floor: Relative change of a time on the host's clock, up to which two runs count as the same.
    """
    routers = _shared_routers(a, b)
    problem = clock_problem(a, b)
    notes = [problem] if problem else []
    if not routers:
        notes.append(
            "The two recordings share no router: they are of different models, and only the set-up can be "
            "compared."
        )
    stages_b = b.by_stage()
    shared = [(stage, part, stages_b[stage]) for stage, part in a.by_stage().items() if stage in stages_b]
    if routers and not shared:
        notes.append("The two recordings share no stage, so neither routing nor time can be compared.")
    routing: list[RoutingChange] = []
    changes: list[Change] = []
    for stage, *parts in shared if routers else ():
        sides = [side_of(part, with_times=problem is None) for part in parts]
        called = [r for r in routers if all(len(s.rows(n)) for s, n in zip(sides, r[1:], strict=True))]
        routing += compare_routing(sides[0], sides[1], called, stage)
        changes += _metric_changes(sides, called, stage, only, stages=len(shared), host_floor=host_floor)
        notes += _too_few_note(stage, min(side.units for side in sides))
    notes += [_HOST] * any(change.verdict == "host" for change in changes)
    notes += _floor_note(changes)
    notes += _provenance(a, b)
    return Comparison(
        a=a.trace or "A",
        b=b.trace or "B",
        setup=setup_changes(a, b),
        routing=tuple(routing),
        changes=tuple(changes),
        notes=tuple(notes),
    )


def _provenance(a: TraceSummary, b: TraceSummary) -> list[str]:
    return [
        f"Times of {side} inside compiled code are {summary.phases.provenance}."
        for side, summary in (("A", a), ("B", b))
        if summary.phases is not None and summary.phases.provenance is not None
    ]


def _shared_routers(a: TraceSummary, b: TraceSummary) -> list[Shared]:
    """Match routers by module path, or by label if no path is in both."""
    paths_b = {router.info.name for router in b.routers}
    found = [(r.info.site, r.info.name, r.info.name) for r in a.routers if r.info.name in paths_b]
    if found:
        return found
    labels_b = {router.info.site: router.info.name for router in b.routers}
    return [(r.info.site, r.info.name, labels_b[r.info.site]) for r in a.routers if r.info.site in labels_b]


def _metric_changes(
    sides: Sequence[Side],
    routers: Sequence[Shared],
    stage: str,
    only: str | None,
    *,
    stages: int,
    host_floor: float,
) -> Iterator[Change]:
    found_a = estimates(sides[0], [a for _, a, _ in routers])
    found_b = estimates(sides[1], [b for _, _, b in routers])
    metrics = [metric for metric in found_a if metric in found_b]
    compared = len(metrics)
    for i, site in enumerate(("all", *(site for site, _, _ in routers))):
        if only is not None and site != only:
            continue
        family = compared * stages * (1 if site == "all" else len(routers))
        changes = []
        for metric in metrics:
            a, b = found_a[metric][i], found_b[metric][i]
            if a is not None and b is not None and (a.value or b.value):
                floor = host_floor if metric in sides[0].host_clock else 0.0
                changes.append(_change(site, metric, stage, (a, b), 1 - (1 - LEVEL) / family, floor))
        yield from _host_apart(changes)


def _host_apart(changes: Sequence[Change]) -> Iterator[Change]:
    """Mark changes of the host's launch pace on a device; runs of the same thing also differ in it."""
    timed = {c.metric: c for c in changes if c.metric in QUANTILES and not c.metric.endswith("_share")}
    of_device = [c for metric, c in timed.items() if metric not in _HOST_METRICS]
    device_unchanged = "device_busy_p50" in timed and not any(c.verdict == "changed" for c in of_device)
    for change in changes:
        is_host_only = device_unchanged and change.verdict == "changed" and change.metric in _HOST_METRICS
        yield replace(change, verdict="host") if is_host_only else change


def _change(
    site: str, metric: str, stage: str, found: tuple[Estimate, Estimate], level: float, floor: float
) -> Change:
    a, b = found
    bounds = interval(a, b, level)
    low, high = bounds if bounds is not None else (None, None)
    verdict: Verdict
    if a.value == b.value:
        verdict = "same"
    elif low is None or high is None:
        verdict = "few calls"
    else:
        least = floor * min(abs(a.value), abs(b.value))  # the smaller value, for symmetry between A and B
        verdict = "noise" if low <= least and high >= -least else "changed"
    return Change(
        site=site,
        metric=metric,
        a=a.value,
        b=b.value,
        low=low,
        high=high,
        verdict=verdict,
        stage=stage,
        floor=floor,
    )


def _too_few_note(stage: str, fewest: int) -> list[str]:
    if fewest >= UNITS_MIN:
        return []
    forwards = "forward" if fewest == 1 else "forwards"
    return [
        f"{stage}: {fewest} {forwards} on a side, under {UNITS_MIN}: no interval can be given; record more."
    ]


def _floor_note(changes: Sequence[Change]) -> list[str]:
    of_host = {c.metric: c.floor for c in changes if c.floor and c.low is not None}
    if not of_host:
        return []
    times = {change.metric for change in changes} & set(QUANTILES)
    which = "all times" if of_host.keys() == times else ", ".join(of_host)
    return [
        f"Host clock ({which}): a change is reported only where its whole interval lies beyond "
        f"{100 * max(of_host.values()):.3g} %. Runs of the same thing differ by as much when something else "
        "takes the machine for a while; record both again to see whether a smaller change returns "
        "(--host-floor sets the limit)."
    ]
