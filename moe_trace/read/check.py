"""Rules that a merged trace must satisfy, each a small generator of violations."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moe_trace.data.calls.table import placed_by_clock, routers_ranged
from moe_trace.data.schema import RANGE_NAME
from moe_trace.data.trace_json.coverage import Coverage, loss_sentence
from moe_trace.data.trace_json.events import Kind, to_ns
from moe_trace.read.check_graphs import HostPlaces, expected_slices, odd_times
from moe_trace.read.check_inputs import BandEvent, Checked, read_checked
from moe_trace.timeline.placed_calls import PlacedCalls

TOLERANCE = 1e-5
NEARLY_ALL = 0.99
"""Minimum share of joined events; a profiler that starts or stops loses work under way on the device."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A broken rule, its location, and the found and expected values."""

    rule: str
    where: str
    message: str

    @property
    def sentence(self) -> str:
        """Location and message in one line."""
        return f"{self.where}: {self.message}"


__all__ = ["RULES", "Checked", "Violation", "check", "read_checked"]

Rule = Callable[[Checked], Iterator[tuple[str, str]]]
"""A generator of (where, message)."""


# -- rules --------------------------------------------------------------------------------------------


def versions_known(checked: Checked) -> Iterator[tuple[str, str]]:
    """Versions of the writing packages are release numbers (reading rejects an unknown schema)."""
    for package, version in checked.recording.versions.items():
        if not re.match(r"\d+\.\d+", version):
            yield package, f"{version!r} is no version"


def samples_are_accounted_for(checked: Checked) -> Iterator[tuple[str, str]]:
    """The number of samples without a placement equals the number that the file reports as lost."""
    calls, lost = checked.recording.calls, checked.recording.lost
    missing = ~calls.places.placed
    without, in_graphs = int((missing & ~calls.in_graph).sum()), int((missing & calls.in_graph).sum())
    if without != lost.samples_without_range:
        yield "lost", f"{without} samples have no range, but the file counts {lost.samples_without_range}"
    by_clock, explained = int(placed_by_clock(calls).sum()), sum(lost.without_range.values())
    if explained and without + by_clock != explained:
        yield "lost", f"{without + by_clock} samples have no range, but the file says why of {explained}"
    if lost.unplaced and in_graphs != sum(lost.unplaced.values()):
        yield "lost", f"{in_graphs} samples of graphs have no place, but the file says why: {lost.unplaced}"


def ranges_are_accounted_for(checked: Checked) -> Iterator[tuple[str, str]]:
    """The number of router ranges equals placed samples + ranges without a sample."""
    events = checked.events
    names = events.select(events.kind == Kind.RANGE).name
    is_router = [(m := RANGE_NAME.fullmatch(name)) is not None and m[1] == "router" for name in events.names]
    ranges = int(np.array(is_router, dtype=bool)[names].sum()) if len(names) else 0
    calls = checked.recording.calls
    placed = int((routers_ranged(calls) & ~placed_by_clock(calls)).sum())
    lost = checked.recording.lost.ranges_without_sample
    if ranges != placed + lost:
        yield "ranges", f"the trace has {ranges} router ranges, but {placed} samples and {lost} lost"


def placements_are_ranges(checked: Checked) -> Iterator[tuple[str, str]]:
    """Every host placement is a range of the trace with its name and times, the launch of a graph, operators
    inside a graph, or, for a call without a range, a time of the host's clock."""
    places = HostPlaces(checked.events)
    calls = checked.recording.calls
    for sample, by_clock in zip(calls, placed_by_clock(calls).tolist(), strict=True):
        if sample.placement is None or by_clock:
            continue
        for kind, span in sample.placement.host.items():
            if not places.hold(sample, kind, span):
                yield _call(sample), f"no {kind} range of the trace starts at {span.start_us:.3f} µs"


def assignments_add_up(checked: Checked) -> Iterator[tuple[str, str]]:
    """The number of assignments equals tokens x k - skipped, and agrees with the histogram of k."""
    for sample in checked.recording.samples:
        expected = sample.tokens * sample.top_k - sample.skipped
        assigned = int(sample.assignments.sum())
        if assigned != expected:
            yield _call(sample), f"{assigned} assignments, expected tokens·k - skipped = {expected}"
        if sample.slot_assignments is not None and sample.slot_experts is not None:
            known = sample.slot_experts >= 0
            slots = sample.slot_experts[known], sample.slot_assignments[known]
            if not np.array_equal(np.bincount(*slots, len(sample.assignments)), sample.assignments):
                yield _call(sample), "the slots' counts do not add up to those of their experts"
        if not sample.k_histogram.any():  # unknown, see `record/calls/settled_rows.py`
            continue
        by_k = int((sample.k_histogram * np.arange(len(sample.k_histogram))).sum())
        if by_k != assigned:
            yield _call(sample), f"the k histogram holds {by_k} slots, the experts {assigned}"
        if int(sample.k_histogram.sum()) != sample.tokens:
            yield _call(sample), f"the k histogram holds {sample.k_histogram.sum()} of {sample.tokens} tokens"


def counts_are_possible(checked: Checked) -> Iterator[tuple[str, str]]:
    """No count is negative, no part exceeds its whole, and each expert has one entry."""
    sizes = {router.name: router.num_experts for router in checked.recording.routers}
    for sample in checked.recording.samples:
        if len(sample.assignments) != sizes[sample.name]:
            yield _call(sample), f"{len(sample.assignments)} counts for {sizes[sample.name]} experts"
        parts = (sample.skipped, sample.padding_assignments, sample.nonfinite_tokens, sample.tokens)
        if min(parts) < 0 or sample.assignments.min(initial=0) < 0 or sample.k_histogram.min(initial=0) < 0:
            yield _call(sample), "a count is negative"
        if sample.padding_assignments > sample.assignments.sum() or sample.nonfinite_tokens > sample.tokens:
            yield _call(sample), "a part is larger than its whole"


def figures_are_in_range(checked: Checked) -> Iterator[tuple[str, str]]:
    """Router entropy is within [0, ln E]; probabilities and confidence are within [0, 1]."""
    for sample in checked.recording.samples:
        max_entropy = math.log(max(1, len(sample.assignments)))
        bounds = {
            "router_entropy": max_entropy,
            "confidence": 1.0,
            "top1_prob": 1.0,
            "topk_mass": 1.0,
            "z_loss": math.inf,
        }
        for name, high in bounds.items():
            value = getattr(sample, name)
            if value is not None and not -TOLERANCE <= value <= high + TOLERANCE:
                yield _call(sample), f"{name} is {value}, expected 0 to {high:.4g}"


def counters_stand_in_ranges(checked: Checked) -> Iterator[tuple[str, str]]:
    """Each counter event is at the start or the end of a call's MoE layer."""
    placed = PlacedCalls.of(checked.recording.calls)
    spans = np.concatenate([placed.moe, placed.spans["graph"][placed.having("graph")]])
    edges = {*to_ns(spans[:, 0]).tolist(), *to_ns(spans.sum(1)).tolist()}  # computed as in merging
    for event in checked.band:
        if event.ph == "C" and event.start_ns not in edges:
            yield event.name, f"a counter at {event.start_ns / 1000:.3f} µs is at the edge of no MoE layer"


def counters_return_to_zero(checked: Checked) -> Iterator[tuple[str, str]]:
    """The last event of each counter sets it to 0."""
    last: dict[Any, BandEvent] = {}
    for event in checked.band:
        if event.ph == "C" and (event.track not in last or event.start_ns >= last[event.track].start_ns):
            last[event.track] = event
    for event in last.values():
        if event.value:
            yield event.name, f"the counter ends at {event.value}, expected 0"


def lanes_do_not_cross(checked: Checked) -> Iterator[tuple[str, str]]:
    """Slices of one lane do not overlap."""
    lanes: dict[Any, list[BandEvent]] = defaultdict(list)
    for event in checked.band:
        if event.ph == "X":
            lanes[event.track].append(event)
    for lane in lanes.values():
        lane.sort(key=lambda e: e.start_ns)
        for before, after in itertools.pairwise(lane):
            # A microsecond with three decimals does not always survive conversion to float, so 1 ns is no
            # overlap.
            if after.start_ns < before.start_ns + before.duration_ns - 1:
                yield after.name, f"a slice starts at {after.start_ns / 1000:.3f} µs, inside {before.name}"


def slices_are_the_calls(checked: Checked) -> Iterator[tuple[str, str]]:
    """Every placed call has its slices, or shares that of its graph, and every slice belongs to a call."""
    expected: defaultdict[tuple[str, int, int], int] = defaultdict(int)
    for name, span in expected_slices(checked.recording.calls):
        start, duration = to_ns([span.start_us, span.duration_us]).tolist()
        expected[name, start, duration] += 1
    for event in checked.band:
        if event.ph == "X":
            expected[event.name, event.start_ns, event.duration_ns] -= 1
    for (site, start, _), count in expected.items():
        if count:
            problem = "has no slice in the band" if count > 0 else "is a slice of no call"
            yield site, f"{start / 1000:.3f} µs {problem}"


def times_are_inside_graphs(checked: Checked) -> Iterator[tuple[str, str]]:
    """Routers and experts inside a graph run within the graph's time."""
    for sample in checked.recording.samples:
        yield from ((_call(sample), message) for message in odd_times(sample))


def events_can_be_read(checked: Checked) -> Iterator[tuple[str, str]]:
    """No event is malformed or has a timestamp that no clock can show."""
    if checked.events.unreadable:
        yield "events", f"{checked.events.unreadable} events could not be read"


_COVERAGE_RULES = {
    "ranges_hold_operators": "calls",
    "kernels_have_launches": "kernels",
    "launches_have_kernels": "launches",
    "flows_have_both_ends": "backward",
    "collectives_have_their_work": "collectives",
}
"""Part of the time coverage that each rule checks: nearly all of its events must be joined."""


def _check_coverage(part: str, checked: Checked) -> Iterator[tuple[str, str]]:
    coverage: Coverage = getattr(checked.coverage, part)
    sentence = loss_sentence(part, coverage)
    if sentence is not None and (coverage.share or 0.0) < NEARLY_ALL:
        yield "trace", sentence


_CALL_RULES: tuple[Rule, ...] = (
    versions_known,
    samples_are_accounted_for,
    ranges_are_accounted_for,
    placements_are_ranges,
    assignments_add_up,
    counts_are_possible,
    figures_are_in_range,
    counters_stand_in_ranges,
    counters_return_to_zero,
    lanes_do_not_cross,
    slices_are_the_calls,
    times_are_inside_graphs,
    events_can_be_read,
)
RULES: dict[str, Rule] = {rule.__name__: rule for rule in _CALL_RULES}
RULES |= {name: partial(_check_coverage, part) for name, part in _COVERAGE_RULES.items()}


def check(checked: Checked) -> dict[str, list[Violation]]:
    """Return the violations of every rule by name; the list is empty if the rule holds."""
    return {
        name: [Violation(rule=name, where=where, message=message) for where, message in rule(checked)]
        for name, rule in RULES.items()
    }


def _call(sample: Any) -> str:
    return f"{sample.site} call {sample.call}"
